"""The whole network: what is encoded once, what is frozen, what comes out, and that its halves make the whole."""

import copy

import pytest
import torch
from segment_anything.modeling import PromptEncoder
from torch import nn

from scripts.errors import ConfigError, InputError
from scripts.networks import pieces
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.mask_decoding import build_prompt_encoder
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings

SIZE = 32
IDS = (1, 2, 4)
PRESETS = ["paper", "release"]
TRAINABLE_OF_RELEASE = 6_277_156  # class prompt encoder 2 218 816 and mask decoder 4 058 340
SETTINGS = {"image_encoder": "compact", "image_size": SIZE, "class_ids": IDS, "channels": (8, 16, 32)}


def small(*, seed: int = 0, **settings) -> AutoMedSAM:
    """A small network with seeded weights; T = 1 makes the noise as large as it can be."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoMedSAM(**{**SETTINGS, "diffusion_steps": 1, **settings})


@pytest.fixture(scope="module", params=PRESETS)
def network(request) -> AutoMedSAM:
    """A network of each preset, for tests that leave it as it is."""
    return small(preset=request.param).eval().requires_grad_(False)


def pictures(generator: torch.Generator, count: int, size: int = SIZE) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=generator)


def noise_for(network: AutoMedSAM, generator: torch.Generator, images: int, prompts: int) -> torch.Tensor:
    return torch.randn((images, prompts, 256, network.grid_size, network.grid_size), generator=generator)


def count_calls(module: nn.Module) -> list[int]:
    """The number of rows of every later call of a module, appended."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    return calls


def assert_same(first: MaskPrediction, second: MaskPrediction) -> None:
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.quality, second.quality, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.prompts.sparse, second.prompts.sparse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.prompts.dense, second.prompts.dense, rtol=1e-4, atol=1e-5)


# Images and prompts.


@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (1, 3), (4, 1), (2, 3)])
def test_each_image_is_encoded_once_for_all_its_prompts(images, prompts, generator):
    network = small().eval()
    calls = count_calls(network.image_encoder)
    prediction = network(pictures(generator, images), torch.ones((images, prompts), dtype=torch.int64))
    assert calls == [images]
    assert prediction.logits.shape == (images, prompts, SIZE, SIZE)
    assert prediction.quality.shape == (images, prompts)
    assert prediction.prompts.sparse.shape == (images * prompts, 2, 256)
    assert prediction.prompts.dense.shape == (images * prompts, 256, network.grid_size, network.grid_size)
    assert prediction.teacher is None


def test_all_classes_too_encode_each_image_once(generator):
    network = small().eval()
    calls = count_calls(network.image_encoder)
    network(pictures(generator, 2))
    assert calls == [2]


def test_several_prompts_of_an_image_are_the_same_one_by_one(network, generator):
    image, ids = pictures(generator, 1), torch.tensor([[4, 1, 2]])
    noise, timestep = noise_for(network, generator, 1, 3), torch.tensor([[1, 5, 9]])
    together = network(image, ids, noise, timestep)
    for k in range(3):
        one = slice(k, k + 1)
        alone = network(image, ids[:, one], noise[:, one], timestep[:, one])
        torch.testing.assert_close(together.logits[:, one], alone.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.quality[:, one], alone.quality, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.prompts.sparse[one], alone.prompts.sparse, rtol=1e-4, atol=1e-5)


def test_a_batch_with_one_class_each_is_the_same_one_by_one(network, generator):
    images, ids = pictures(generator, 3), torch.tensor([[4], [1], [2]])
    noise, timestep = noise_for(network, generator, 3, 1), torch.tensor([[1], [5], [9]])
    together = network(images, ids, noise, timestep)
    for i in range(3):
        one = slice(i, i + 1)
        alone = network(images[one], ids[one], noise[one], timestep[one])
        torch.testing.assert_close(together.logits[one], alone.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.prompts.dense[one], alone.prompts.dense, rtol=1e-4, atol=1e-5)


def test_images_with_several_prompts_each_are_the_same_one_by_one(network, generator):
    images, ids = pictures(generator, 2), torch.tensor([[1, 2], [4, 1]])
    box = torch.tensor([[[1, 2, 9, 8], [3, 3, 20, 30]], [[5, 6, 7, 8], [0, 0, 31, 31]]], dtype=torch.float32)
    together = network(images, ids, box=box)
    for i in range(2):
        for k in range(2):
            alone = network(images[i : i + 1], ids[i : i + 1, k : k + 1], box=box[i : i + 1, k : k + 1])
            torch.testing.assert_close(together.logits[i, k], alone.logits[0, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(together.quality[i, k], alone.quality[0, 0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together.teacher.sparse[2 * i + k], alone.teacher.sparse[0])
    assert (together.logits[0, 0] - together.logits[1, 1]).abs().max() > 1e-3  # class 1 in two images


@pytest.mark.parametrize("piece", [1, 2**20])
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (1, 13), (2, 13), (3, 1)])
def test_classes_of_an_image_are_as_of_images_of_their_own(network, images, prompts, piece, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    ids = torch.randint(1, 19, (images, prompts), generator=generator)
    with torch.no_grad():
        embedding = network.encode_image(pictures(generator, images))
        repeated = embedding.repeat_interleave(prompts, dim=0)
        for noise in (None, noise_for(network, generator, images, prompts)):
            made = network.encode_classes(embedding, ids, noise=noise)
            own_noise = None if noise is None else noise.flatten(0, 1).unsqueeze(1)
            own = network.encode_classes(repeated, ids.reshape(-1, 1), noise=own_noise)
            for first, second in zip(made, own, strict=True):
                assert (first - second).abs().max() <= 1e-5 * second.abs().max()
            logits, quality = network.decode(embedding, made)
            own_logits, own_quality = network.decode(repeated, own)
            torch.testing.assert_close(logits.flatten(0, 1), own_logits[:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(quality.flatten(), own_quality[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["compact", "compact_detailed", "lite_medsam", "sam_vit_b"])
def test_with_and_without_gradients_the_answer_is_the_same(encoder, generator):
    network = small(image_encoder=encoder).eval()
    images, ids = pictures(generator, 2), torch.tensor([[1, 2, 4], [4, 4, 1]])
    with torch.no_grad():
        plain = network(images, ids)
    assert_same(network(images, ids), plain)
    with torch.inference_mode():
        assert_same(network(images, ids), plain)


def test_the_class_decides_the_mask(network, generator):
    logits = network(pictures(generator, 1), torch.tensor([[1, 4]])).logits
    assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-3


def test_the_halves_make_the_whole(network, generator):
    images, ids = pictures(generator, 2), torch.tensor([[1, 2], [4, 1]])
    noise, timestep = noise_for(network, generator, 2, 2), torch.tensor([[1, 2], [3, 4]])
    embedding = network.encode_image(images)
    prompts = network.encode_classes(embedding, ids, noise=noise, timestep=timestep)
    logits, quality = network.decode(embedding, prompts)
    assert embedding.shape == (2, 256, network.grid_size, network.grid_size)
    assert_same(MaskPrediction(logits, quality, prompts), network(images, ids, noise, timestep))


# Without class ids: every class, at its id.


@pytest.mark.parametrize("count", [1, 3])
def test_without_class_ids_channel_k_is_class_k(network, count, generator):
    images = pictures(generator, count)
    channels = network(images)
    asked = network(images, torch.tensor([IDS]).expand(count, -1)).logits
    assert channels.shape == (count, 5, SIZE, SIZE)
    assert torch.equal(channels[:, 0], torch.zeros_like(channels[:, 0]))
    torch.testing.assert_close(channels[:, list(IDS)], asked, rtol=1e-4, atol=1e-5)
    assert (channels[:, 3] == torch.finfo(torch.float32).min).all()  # no class has the id 3


def test_the_largest_channel_is_the_label_map(generator):
    network = small().eval()
    with torch.no_grad():
        network.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight *= 20
        channels = network(pictures(generator, 2))
    labels = channels.argmax(dim=1)
    asked = channels[:, list(IDS)]
    by_hand = torch.where(asked.amax(dim=1) > 0, torch.tensor(IDS)[asked.argmax(dim=1)], 0)
    assert torch.equal(labels, by_hand)
    assert 3 not in labels
    assert len(labels.unique()) > 1


def test_the_order_of_the_class_ids_does_not_matter(generator):
    images = pictures(generator, 1)
    torch.testing.assert_close(small(class_ids=[4, 1, 2]).eval()(images), small().eval()(images))


# Noise.


def test_without_noise_the_answer_is_always_the_same(network, generator):
    images, ids = pictures(generator, 2), torch.tensor([[1], [2]])
    state = torch.get_rng_state()
    first, second = network(images, ids), network(images, ids)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


def test_the_noise_changes_the_answer_and_the_same_noise_does_not(network, generator):
    images, ids = pictures(generator, 1), torch.tensor([[1]])
    noise = noise_for(network, generator, 1, 1)
    plain, noisy, again = network(images, ids), network(images, ids, noise), network(images, ids, noise)
    assert torch.equal(noisy.logits, again.logits)
    assert (noisy.logits - plain.logits).abs().max() > 1e-4


def test_the_time_step_is_the_callers(generator):
    network = small(diffusion_steps=9).eval()
    images, ids = pictures(generator, 1), torch.tensor([[1, 2]])
    noise = noise_for(network, generator, 1, 2)
    last = network(images, ids, noise).logits
    mixed = network(images, ids, noise, torch.tensor([[9, 1]])).logits
    torch.testing.assert_close(mixed[:, 0], last[:, 0], rtol=1e-4, atol=1e-5)
    assert (mixed[:, 1] - last[:, 1]).abs().max() > 1e-4


def test_noise_belongs_to_its_own_image_and_prompt(network, generator):
    images, ids = pictures(generator, 2), torch.tensor([[1, 2], [1, 2]])
    noise = torch.zeros((2, 2, 256, network.grid_size, network.grid_size))
    plain = network(images, ids, noise).logits
    noise[1, 0] = noise_for(network, generator, 1, 1)[0, 0]
    changed = (network(images, ids, noise).logits - plain).abs().amax(dim=(2, 3)) > 1e-4
    assert changed.tolist() == [[False, False], [True, False]]


# What is frozen.


def train_once(network: AutoMedSAM, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    network.train()
    prediction = network(pictures(generator, 2), torch.tensor([[1], [2]]))
    prediction.logits.square().mean().backward()
    optimizer.step()


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the network in which any entry, statistics included, is another now."""
    return {name.split(".")[0] for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("encoder", ["compact", "lite_medsam"])
def test_a_frozen_encoder_keeps_its_weights_and_batch_statistics(encoder, generator):
    network = small(image_encoder=encoder)
    before = copy.deepcopy(network.state_dict())
    if encoder == "lite_medsam":
        assert any(name.endswith("running_mean") for name in before)
    train_once(network, generator)
    assert changed(network, before) == {"class_prompt_encoder", "mask_decoder"}


def test_an_encoder_that_is_to_learn_does(generator):
    network = small(image_encoder="lite_medsam", train_image_encoder=True)
    before = copy.deepcopy(network.state_dict())
    train_once(network, generator)
    assert changed(network, before) == {"image_encoder", "class_prompt_encoder", "mask_decoder"}
    name = "image_encoder.patch_embed.seq.0.bn.running_mean"
    assert not torch.equal(network.state_dict()[name], before[name])


@pytest.mark.parametrize("train_image_encoder", [False, True])
def test_which_parts_are_in_training_mode(train_image_encoder):
    network = small(image_encoder="lite_medsam", train_image_encoder=train_image_encoder)
    for mode in (None, True, False):  # None: as it was built
        if mode is not None:
            assert network.train(mode) is network
        learning = mode is not False
        modes = {name: {m.training for m in part.modules()} for name, part in network.named_children()}
        assert modes == {
            "image_encoder": {learning and train_image_encoder},
            "class_prompt_encoder": {learning},
            "prompt_encoder": {False},
            "mask_decoder": {learning},
        }
    assert not network.eval().image_encoder.training


@pytest.mark.parametrize("train_image_encoder", [False, True])
def test_which_parameters_learn(train_image_encoder):
    network = small(train_image_encoder=train_image_encoder)
    learning = {name.split(".")[0] for name, value in network.named_parameters() if value.requires_grad}
    frozen = {name.split(".")[0] for name, value in network.named_parameters() if not value.requires_grad}
    expected = {"class_prompt_encoder", "mask_decoder"} | ({"image_encoder"} if train_image_encoder else set())
    assert learning == expected
    assert frozen == {"prompt_encoder", "image_encoder"} - expected


@pytest.mark.parametrize("train_image_encoder", [False, True])
def test_the_gradient_reaches_the_embedding_only_where_it_is_wanted(train_image_encoder, generator):
    network = small(train_image_encoder=train_image_encoder)
    assert network.encode_image(pictures(generator, 1)).requires_grad is train_image_encoder


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gradient_reaches_the_class_prompt_encoder_and_the_mask_decoder(preset, generator):
    network = small(preset=preset).train()
    box = torch.tensor([[[1.0, 2.0, 9.0, 8.0]], [[3.0, 3.0, 20.0, 30.0]]])
    prediction = network(pictures(generator, 2), torch.tensor([[1], [2]]), box=box)
    prediction.logits.square().mean().backward()
    for name, parameter in network.class_prompt_encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    # The masks that SAM uses against ambiguous clicks, and the quality, take no part in the mask.
    unused = ("iou_prediction_head", *(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3)))
    for name, parameter in network.mask_decoder.named_parameters():
        if name.startswith(unused):
            assert parameter.grad is None, name
        else:
            assert torch.isfinite(parameter.grad).all(), name
    assert network.mask_decoder.output_upscaling[0].weight.grad.abs().sum() > 0
    assert network.mask_decoder.transformer.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    frozen = [*network.image_encoder.parameters(), *network.prompt_encoder.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_release_learns_as_many_parameters_as_the_authors_network():
    with torch.device("meta"):
        network = AutoMedSAM(image_encoder="lite_medsam", preset="release")
    assert (network.image_size, network.grid_size) == (256, 64)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == TRAINABLE_OF_RELEASE


# The teacher.


def test_the_teacher_is_sams_prompt_encoder_on_the_box(network, generator):
    box = torch.tensor([[[1.0, 2.0, 9.0, 8.0], [0.0, 0.0, 31.0, 31.0]]])
    teacher = network(pictures(generator, 1), torch.tensor([[1, 2]]), box=box).teacher
    grid = (network.grid_size, network.grid_size)
    sam = PromptEncoder(embed_dim=256, image_embedding_size=grid, input_image_size=(SIZE, SIZE), mask_in_chans=16)
    sam.load_state_dict(network.prompt_encoder.state_dict())
    for k in range(2):
        sparse, dense = sam(points=None, boxes=box[0, k : k + 1], masks=None)
        torch.testing.assert_close(teacher.sparse[k], sparse[0].detach())
        torch.testing.assert_close(teacher.dense[k], dense[0].detach())


def test_the_teachers_tokens_are_the_corners_and_its_map_is_constant(network):
    teacher = network.encode_boxes(torch.tensor([[[4.0, 6.0, 20.0, 30.0]]]))
    encoder = network.prompt_encoder
    assert teacher.sparse.shape == (1, 2, 256)
    assert teacher.dense.shape == (1, 256, network.grid_size, network.grid_size)
    constant = encoder.no_mask_embed.weight.reshape(1, 256, 1, 1)
    torch.testing.assert_close(teacher.dense, constant.expand_as(teacher.dense))
    for token, (x, y) in enumerate([(4.0, 6.0), (20.0, 30.0)]):
        place = 2 * (torch.tensor([x, y]) + 0.5) / SIZE - 1  # the middle of the pixel, from -1 to 1
        wave = 2 * torch.pi * (place @ encoder.pe_layer.positional_encoding_gaussian_matrix)
        corner = torch.cat((wave.sin(), wave.cos())) + encoder.point_embeddings[2 + token].weight[0]
        torch.testing.assert_close(teacher.sparse[0, token], corner, rtol=1e-4, atol=1e-5)


def test_the_teacher_has_no_gradient(generator):
    network = small().train()
    teacher = network(pictures(generator, 1), torch.tensor([[1]]), box=torch.tensor([[[1.0, 2.0, 9.0, 8.0]]])).teacher
    assert not teacher.sparse.requires_grad
    assert not teacher.dense.requires_grad


# Sizes and pixels.


@pytest.mark.parametrize(("encoder", "size", "grid"), [("compact", 64, 8), ("lite_medsam", 32, 8)])
def test_the_masks_have_the_images_size(encoder, size, grid, generator):
    network = small(image_encoder=encoder, image_size=size).eval()
    embedding = network.encode_image(pictures(generator, 1, size))
    prompts = network.encode_classes(embedding, torch.tensor([[1, 2]]))
    assert network.grid_size == grid
    logits, _ = network.decode(embedding, prompts)
    assert logits.shape == (1, 2, size, size)
    small_logits, _ = network.mask_decoder(
        embedding.expand(2, -1, -1, -1), network.prompt_encoder.get_dense_pe(), prompts
    )
    expected = nn.functional.interpolate(small_logits.unsqueeze(0), size=(size, size), mode="bilinear")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_pixels_stay_as_they_are_or_lose_sams_mean_and_deviation(generator):
    image = pictures(generator, 2)
    unit, sam = small(pixel_normalisation="unit").eval(), small(pixel_normalisation="sam").eval()
    mean = torch.tensor([123.675, 116.28, 103.53]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([58.395, 57.12, 57.375]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(unit.encode_image(image), unit.image_encoder(image))
    torch.testing.assert_close(
        sam.encode_image(image), sam.image_encoder((255 * image - mean) / deviation), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(unit.encode_image(image), sam.encode_image(image))


def test_the_constants_of_the_pixels_are_not_in_the_weights():
    assert not [name for name in small().state_dict() if "pixel" in name]


def test_the_published_prompt_encoders_sizes_are_kept():
    network = small()
    expected = build_prompt_encoder(grid_size=network.grid_size, image_size=SIZE)
    assert network.prompt_encoder.input_image_size == expected.input_image_size
    assert network.prompt_encoder.image_embedding_size == expected.image_embedding_size


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_gives_nearly_the_same(preset, generator):
    network = small(preset=preset).eval()
    images, ids = pictures(generator, 1), torch.tensor([IDS])
    with torch.no_grad():
        exact, exact_channels = network(images, ids).logits, network(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, channels = network(images, ids).logits, network(images)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02
    assert channels.shape == exact_channels.shape
    assert (channels[:, 0] == 0).all()


# Settings.


def test_the_settings_rebuild_the_network(generator):
    network = small(preset="release", pixel_normalisation="sam", class_ids=[2, 5], seed=3).eval()
    again = AutoMedSAM(**network.settings).eval()
    again.load_state_dict(network.state_dict())
    images = pictures(generator, 1)
    torch.testing.assert_close(again(images), network(images))
    assert again.settings == network.settings


def test_the_settings_are_these_and_plain():
    assert small(image_size=None, preset="release", diffusion_steps=7).settings == {
        "image_encoder": "compact",
        "image_size": None,
        "class_ids": [1, 2, 4],
        "preset": "release",
        "channels": [8, 16, 32],
        "diffusion_steps": 7,
        "diffusion": True,
        "class_code": "scalar",
        "prompt_branches": "both",
        "pixel_normalisation": "unit",
    }


def test_the_steps_reach_the_class_prompt_encoder():
    network = small(diffusion_steps=7)
    assert network.diffusion_steps == network.class_prompt_encoder.diffusion_steps == 7


@pytest.mark.parametrize("branch", ["dense", "sparse"])
def test_a_branch_that_is_left_out_is_as_for_sam_without_such_a_prompt(branch, generator):
    whole, part = small().eval(), small(prompt_branches=branch).eval()
    image, ids = pictures(generator, 2), torch.tensor([[1, 4], [2, 1]])
    embedding = whole.encode_image(image)
    prompts = whole.encode_classes(embedding, ids)
    sparse, dense = whole.prompt_encoder(points=None, boxes=None, masks=None)  # SAM's own answer to no prompt at all
    expected = {
        "dense": PromptEmbeddings(sparse.expand(4, -1, -1), prompts.dense),
        "sparse": PromptEmbeddings(prompts.sparse, dense.expand(4, -1, -1, -1)),
    }[branch]
    answer = part(image, ids)
    torch.testing.assert_close(answer.logits, whole.decode(embedding, expected)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answer.logits, whole(image, ids).logits)
    assert part.settings["prompt_branches"] == branch


def test_without_diffusion_noise_makes_no_difference(generator):
    network = small(diffusion=False).eval()
    image, ids = pictures(generator, 1), torch.tensor([[1, 4]])
    assert_same(network(image, ids, noise=noise_for(network, generator, 1, 2)), network(image, ids))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image_encoder": "vit"}, "not 'vit'"),
        ({"image_size": 50}, "not 50"),
        ({"class_ids": ()}, r"from 1 up, not \[\]"),
        ({"class_ids": (0, 1)}, r"from 1 up, not \[0, 1\]"),
        ({"class_ids": (1, 2, 2)}, r"distinct numbers from 1 up, not \[1, 2, 2\]"),
        ({"preset": "both"}, "not 'both'"),
        ({"channels": (8, 16)}, r"three widths .* not \[8, 16\]"),
        ({"diffusion_steps": 0}, "0 is no number of steps"),
        ({"pixel_normalisation": "none"}, "'unit' or 'sam', not 'none'"),
        ({"prompt_branches": "none"}, "'both', 'dense' or 'sparse', not 'none'"),
    ],
)
def test_a_wrong_setting_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        small(**wrong)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 32, 16), (1, 1, 32, 32), (3, 32, 32)])
@pytest.mark.parametrize("encoder", ["compact", "lite_medsam"])
def test_an_image_of_another_shape_is_refused(encoder, shape):
    with pytest.raises(InputError, match=r"expects \(B, 3, 32, 32\)"):
        small(image_encoder=encoder)(torch.zeros(shape))


# --- details of the image encoder


def test_weights_from_before_the_details_give_the_same_masks(generator):
    plain = small(class_code="learned").eval()
    detailed = small(class_code="learned", image_encoder="compact_detailed").eval()
    for values in detailed.mask_decoder.details.parameters():
        nn.init.normal_(values)  # what was learned of details does not belong to other weights
    detailed.load_state_dict(plain.state_dict())
    images, ids = pictures(generator, 2), torch.tensor([[1, 2], [4, 1]])
    assert_same(detailed(images, ids), plain(images, ids))
    assert detailed.encode_image(images).shape == (2, detailed.embedding_channels, 4, 4)
    assert (plain.embedding_channels, detailed.embedding_channels) == (256, 640)


def test_details_have_a_say_once_learned(generator):
    network = small(image_encoder="compact_detailed", train_image_encoder=True)
    before = copy.deepcopy(network.state_dict())
    for _ in range(2):  # the encoder's learn as soon as the decoder's are not zero
        train_once(network, generator)
    learned = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if ".details." in name} <= learned


def test_some_details_without_the_others_are_refused(generator):
    network = small(image_encoder="compact_detailed")
    state = network.state_dict()
    del state["mask_decoder.details.0.weight"]
    with pytest.raises(RuntimeError, match=r"mask_decoder.details.0.weight"):
        network.load_state_dict(state)
