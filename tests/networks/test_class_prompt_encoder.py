"""The class prompt encoder against a reference output of the authors' network, and its two presets part by part."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.errors import ConfigError
from scripts.networks import pieces
from scripts.networks.class_prompt_encoder import ClassPromptEncoder, TwoBranchUNet

CHANNELS = (8, 16, 32)
GRID = 4
PRESETS = ["paper", "release"]
RELEASE_PARAMETERS = 2_218_816


def small(
    preset: str = "paper", *, seed: int = 0, grid_size: int = GRID, steps: int = 100, **settings: str
) -> ClassPromptEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ClassPromptEncoder(
            grid_size=grid_size, preset=preset, channels=CHANNELS, diffusion_steps=steps, **settings
        ).requires_grad_(False)


def embeddings(generator: torch.Generator, rows: int, grid_size: int = GRID) -> torch.Tensor:
    return torch.randn((rows, 256, grid_size, grid_size), generator=generator)


def record(module: nn.Module) -> list[torch.Tensor]:
    """The first input and the output of every later call of a module, appended."""
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    return seen


def golden(shared: Path) -> dict:
    return json.loads((shared / "golden" / "release_class_prompt_encoder.json").read_text())


def seeded(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The value that the reference output was computed with (README of the golden folder)."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    value = rng.normal(0, 0.1, shape) if len(shape) <= 1 else rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


# The authors' network.


def test_release_gives_the_reference_output(shared):
    facts = golden(shared)
    encoder = ClassPromptEncoder(preset="release", diffusion_steps=facts["timesteps"])
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    encoder.load_state_dict({name: seeded(name, shape, facts["seed"]) for name, shape in shapes.items()})
    rng = np.random.default_rng([facts["seed"], 7])
    embedding = torch.from_numpy(rng.normal(0, 0.3, (2, 256, 64, 64)).astype(np.float32))
    with torch.no_grad():
        prompts = encoder(embedding, torch.tensor(facts["labels"]), torch.zeros_like(embedding))
    with np.load(shared / "golden" / "release_class_prompt_encoder.npz") as expected:
        for name, got in (("dense_stride8", prompts.dense[:, :, ::8, ::8]), ("sparse", prompts.sparse)):
            difference = np.abs(got.numpy() - expected[name]).max()
            assert difference <= 1e-5 * np.abs(expected[name]).max(), name


def test_release_has_the_names_and_shapes_of_the_authors_file(shared):
    with torch.device("meta"):
        state = ClassPromptEncoder(preset="release").state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == golden(shared)["shapes"]


def test_release_has_as_many_parameters_as_the_authors_file():
    with torch.device("meta"):
        encoder = ClassPromptEncoder(preset="release")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == RELEASE_PARAMETERS
    assert sum(parameter.numel() for parameter in encoder.fc_label.parameters()) == 8192


def test_paper_lacks_only_the_class_at_the_first_convolution():
    with torch.device("meta"):
        paper, release = (ClassPromptEncoder(preset=preset).state_dict() for preset in PRESETS)
    assert list(paper) == list(release)
    different = [name for name in paper if paper[name].shape != release[name].shape]
    assert different == ["unet.enc1.0.weight"]
    assert paper["unet.enc1.0.weight"].shape == (64, 256, 3, 3)


# What comes out.


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_and_signs(preset, rows, generator):
    prompts = small(preset)(embeddings(generator, rows), torch.arange(1, rows + 1))
    assert prompts.sparse.shape == (rows, 2, 256)
    assert prompts.dense.shape == (rows, 256, GRID, GRID)
    for values in prompts:
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.max() > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_the_tokens_are_the_means_of_the_upper_and_the_lower_half(preset, generator):
    encoder = small(preset)
    seen = record(encoder.unet.sparse_dec2)
    tokens = encoder(embeddings(generator, 2), torch.tensor([1, 2])).sparse
    decoded = seen[1]
    torch.testing.assert_close(tokens[:, 0], decoded[:, :, : GRID // 2].mean(dim=(2, 3)))
    torch.testing.assert_close(tokens[:, 1], decoded[:, :, GRID // 2 :].mean(dim=(2, 3)))
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_dense_map_is_the_dense_decoders(preset, generator):
    encoder = small(preset)
    seen = record(encoder.unet.dense_dec2)
    dense = encoder(embeddings(generator, 2), torch.tensor([1, 2])).dense
    assert torch.equal(dense, seen[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_gives_what_its_rows_give_alone(preset, generator):
    encoder = small(preset)
    embedding, ids = embeddings(generator, 3), torch.tensor([4, 1, 2])
    noise, timestep = embeddings(generator, 3), torch.tensor([1, 50, 100])
    together = encoder(embedding, ids, noise, timestep)
    for i in range(3):
        row = slice(i, i + 1)
        alone = encoder(embedding[row], ids[row], noise[row], timestep[row])
        torch.testing.assert_close(together.sparse[row], alone.sparse)
        torch.testing.assert_close(together.dense[row], alone.dense)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_class_decides(preset, generator):
    encoder, embedding = small(preset), embeddings(generator, 1)
    one, two = (encoder(embedding, torch.tensor([class_id])) for class_id in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert (first - second).abs().max() > 0.01 * first.max()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_learns(preset, generator):
    encoder = small(preset).requires_grad_(True)
    prompts = encoder(embeddings(generator, 2), torch.tensor([1, 2]))
    (prompts.sparse.sum() + prompts.dense.sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


# Several classes of one image.


def unshared(
    encoder: ClassPromptEncoder, embedding: torch.Tensor, class_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense and sparse maps without noise, each class on its own copy of the image and in full (Eqs. 2 to 12)."""
    images = embedding.repeat_interleave(len(class_ids) // len(embedding), dim=0)
    projected = encoder.project(class_ids)
    if encoder.preset == "paper":
        return encoder.unet(images + projected, projected)
    diffused = torch.cat((images + encoder.diffusion_steps * projected, projected), dim=1)
    return encoder.unet(diffused, class_ids.float().reshape(-1, 1, 1, 1).expand_as(projected))


@pytest.mark.parametrize("piece", [1, 10_000, 2**20])
@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize(("images", "classes"), [(1, 1), (1, 13), (3, 1), (2, 5)])
@pytest.mark.parametrize("preset", PRESETS)
def test_classes_share_their_image_and_give_the_same(preset, images, classes, steps, piece, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    encoder, embedding = small(preset, steps=steps), embeddings(generator, images)
    ids = torch.randint(1, 19, (images * classes,), generator=generator)
    with torch.no_grad():
        prompts = encoder(embedding, ids)
        dense, sparse = unshared(encoder, embedding, ids)
    assert prompts.dense.shape == (images * classes, 256, GRID, GRID)
    assert (prompts.dense - dense).abs().max() <= 1e-5 * dense.abs().max()
    halves = torch.stack(
        (sparse[:, :, : GRID // 2].mean(dim=(2, 3)), sparse[:, :, GRID // 2 :].mean(dim=(2, 3))), dim=1
    )
    assert (prompts.sparse - halves).abs().max() <= 1e-5 * halves.abs().max()


@pytest.mark.parametrize("grid_size", [1, 2, 7])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_shared_convolution_leaves_nothing_out_at_the_border(preset, grid_size, generator):
    encoder = small(preset, grid_size=grid_size, steps=3)
    embedding, ids = embeddings(generator, 1, grid_size), torch.tensor([2, 17])
    seen = record(encoder.unet.enc1)
    unshared(encoder, embedding, ids)
    expected = seen[1]
    class_map = encoder.project(ids)
    repeats = 1 if preset == "paper" else 3
    shared = encoder.unet.share(embedding)
    first = encoder.unet.complete(shared, class_map, repeats=repeats)
    assert first.shape == expected.shape
    assert (first - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
def test_sharing_has_the_same_gradients(preset, generator):
    encoder = small(preset, steps=3).requires_grad_(True)
    ids, weights = torch.tensor([1, 4, 2, 2, 5, 3]), embeddings(generator, 6)
    embedding = embeddings(generator, 2).requires_grad_(True)
    leaves = [embedding, *encoder.parameters()]
    names = ["embedding", *(name for name, _ in encoder.named_parameters())]
    dense, sparse = unshared(encoder, embedding, ids)
    tokens = encoder.token_pool(sparse).flatten(2).transpose(1, 2)
    expected = torch.autograd.grad((dense * weights).sum() + tokens.sum(), leaves)
    prompts = encoder(embedding, ids)
    found = torch.autograd.grad((prompts.dense * weights).sum() + prompts.sparse.sum(), leaves)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


@pytest.mark.parametrize("piece", [1, 10_000])
@pytest.mark.parametrize("preset", PRESETS)
def test_noise_is_that_of_its_row(preset, piece, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    encoder, embedding = small(preset, steps=3), embeddings(generator, 2)
    ids, timestep = torch.tensor([1, 4, 2, 2, 5, 3]), torch.tensor([1, 2, 3, 3, 2, 1])
    noise = embeddings(generator, 6)
    with torch.no_grad():
        together = encoder(embedding, ids, noise, timestep)
        for i in range(6):
            row, image = slice(i, i + 1), embedding[i // 3 : i // 3 + 1]
            alone = encoder(image, ids[row], noise[row], timestep[row])
            torch.testing.assert_close(together.dense[row], alone.dense, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(together.sparse[row], alone.sparse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_convolution_runs_once_for_all_classes_of_an_image(preset, generator):
    encoder, embedding = small(preset), embeddings(generator, 1)
    operations = []
    for classes in (1, 13):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(embedding, torch.arange(1, 1 + classes))
        operations.append(counter.get_total_flops())
    convolution = 2 * 256 * 9 * CHANNELS[0] * GRID**2
    assert operations[1] == 13 * operations[0] - 12 * convolution


# The class, projected.


def test_the_projection_is_linear_in_the_class():
    encoder = small()
    maps = encoder.project(torch.tensor([0, 1, 2, 5]))
    weight, bias = (values.reshape(1, GRID, GRID) for values in (encoder.fc_label.weight, encoder.fc_label.bias))
    assert maps.shape == (4, 1, GRID, GRID)
    for row, class_id in zip(maps, (0, 1, 2, 5), strict=True):
        torch.testing.assert_close(row, class_id * weight + bias)


# What the presets do differently.


def test_paper_takes_one_step_and_only_the_diffused_embedding(generator):
    encoder = small("paper")
    embedding, noise, ids = embeddings(generator, 2), embeddings(generator, 2), torch.tensor([1, 3])
    seen = record(encoder.unet.enc1)
    encoder(embedding, ids, noise, torch.tensor([1, 9]))
    scale = torch.tensor([1 / 2, 1 / 10]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(seen[0], embedding + encoder.project(ids) + scale * noise)


def test_release_accumulates_and_appends_the_projected_class(generator):
    encoder = small("release", steps=7)
    embedding, noise, ids = embeddings(generator, 2), embeddings(generator, 2), torch.tensor([1, 3])
    seen = record(encoder.unet.enc1)
    encoder(embedding, ids, noise)
    assert seen[0].shape == (2, 257, GRID, GRID)
    diffused = embedding + 7 * encoder.project(ids) + 0.72624 * noise
    torch.testing.assert_close(seen[0][:, :256], diffused, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0][:, 256:], encoder.project(ids))


def test_at_the_bottom_paper_has_the_projected_class_and_release_the_number(generator):
    ids = torch.tensor([2, 5])
    for preset in PRESETS:
        encoder = small(preset)
        seen = record(encoder.unet.dense_attention)
        encoder(embeddings(generator, 2), ids)
        number = torch.tensor([2.0, 5.0]).reshape(2, 1, 1, 1).expand(2, 1, GRID, GRID)
        expected = encoder.project(ids) if preset == "paper" else number
        assert seen[0].shape[1] == CHANNELS[1] + 1
        torch.testing.assert_close(seen[0][:, -1:], expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_dense_attention_weighs_the_features_without_the_class(preset, generator):
    encoder = small(preset)
    middle, weights, decoder, second = (
        record(getattr(encoder.unet, name)) for name in ("middle", "dense_attention", "dense_dec1", "enc2")
    )
    encoder(embeddings(generator, 2), torch.tensor([1, 3]))
    assert (weights[1] < 0).any()
    used = weights[1].relu() if preset == "paper" else weights[1]
    assert used.shape[1] == CHANNELS[1]
    torch.testing.assert_close(decoder[0], torch.cat((middle[1] * used, second[1]), dim=1))


@pytest.mark.parametrize("preset", PRESETS)
def test_sparse_attention_weighs_channels(preset, generator):
    encoder = small(preset)
    middle, weights, decoder, second = (
        record(getattr(encoder.unet, name)) for name in ("middle", "sparse_attention", "sparse_dec1", "enc2")
    )
    encoder(embeddings(generator, 2), torch.tensor([1, 3]))
    assert weights[0].shape == (2, CHANNELS[1] + 1, GRID, GRID)
    torch.testing.assert_close(weights[0][:, :-1], middle[1])
    convolution = encoder.unet.sparse_attention[1]
    pooled = weights[0].mean(dim=(2, 3))
    by_hand = torch.sigmoid(pooled @ convolution.weight[:, :, 0, 0].T + convolution.bias)
    torch.testing.assert_close(weights[1], by_hand[:, :, None, None])
    torch.testing.assert_close(decoder[0], torch.cat((middle[1] * by_hand[:, :, None, None], second[1]), dim=1))


def test_the_class_at_the_bottom_acts_through_the_attentions_alone(generator):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = TwoBranchUNet(channels_in=256, channels=CHANNELS, rectified_attention=False).requires_grad_(False)
    diffused, class_map = embeddings(generator, 1), torch.ones(1, 1, GRID, GRID)
    for plain, other in zip(unet(diffused, class_map), unet(diffused, 3 * class_map), strict=True):
        assert not torch.allclose(plain, other)
    unet.dense_attention.weight[:, -1] = 0
    unet.sparse_attention[1].weight[:, -1] = 0
    for plain, other in zip(unet(diffused, class_map), unet(diffused, 3 * class_map), strict=True):
        torch.testing.assert_close(plain, other)


# Noise and time step.


@pytest.mark.parametrize("preset", PRESETS)
def test_the_noise_is_the_callers(preset, generator):
    encoder, embedding, ids = small(preset, steps=1), embeddings(generator, 1), torch.tensor([1])
    noise = embeddings(generator, 1)
    without, again = encoder(embedding, ids), encoder(embedding, ids)
    assert torch.equal(without.dense, again.dense)
    torch.testing.assert_close(without.dense, encoder(embedding, ids, torch.zeros_like(noise)).dense)
    noisy = encoder(embedding, ids, noise)
    assert torch.equal(noisy.dense, encoder(embedding, ids, noise).dense)
    assert (noisy.dense - without.dense).abs().max() > 0.01 * without.dense.max()


def test_no_time_step_means_the_last(generator):
    encoder, embedding, ids = small(steps=3), embeddings(generator, 2), torch.tensor([1, 2])
    noise = embeddings(generator, 2)
    plain = encoder(embedding, ids, noise).dense
    assert torch.equal(plain, encoder(embedding, ids, noise, torch.tensor([3, 3])).dense)
    first = encoder(embedding, ids, noise, torch.tensor([1, 3])).dense
    assert not torch.allclose(plain[0], first[0])
    torch.testing.assert_close(plain[1], first[1])


def test_release_always_takes_all_steps(generator):
    encoder, embedding, ids = small("release"), embeddings(generator, 1), torch.tensor([1])
    noise = embeddings(generator, 1)
    assert torch.equal(encoder(embedding, ids, noise).dense, encoder(embedding, ids, noise, torch.tensor([1])).dense)


# Without diffusion (Table 6).


@pytest.mark.parametrize("preset", PRESETS)
def test_without_diffusion_the_embedding_goes_on_as_it_is(preset, generator):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ClassPromptEncoder(grid_size=GRID, preset=preset, channels=CHANNELS, diffusion=False)
    encoder.requires_grad_(False)
    embedding, ids = embeddings(generator, 1), torch.tensor([3, 5])
    projected = encoder.project(ids)
    images = embedding.expand(2, -1, -1, -1)
    bottom = projected if preset == "paper" else ids.float().reshape(-1, 1, 1, 1).expand_as(projected)
    dense, _ = encoder.unet(images if preset == "paper" else torch.cat((images, projected), dim=1), bottom)
    prompts = encoder(embedding, ids)
    torch.testing.assert_close(prompts.dense, dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prompts.dense[0], prompts.dense[1])  # the class is still told
    assert torch.equal(encoder(embedding, ids, embeddings(generator, 2)).dense, prompts.dense)  # and noise is none


# Errors.


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="'paper' or 'release', not 'both'"):
        ClassPromptEncoder(grid_size=GRID, preset="both", channels=CHANNELS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [0, -1])
def test_no_step_is_refused(preset, steps):
    with pytest.raises(ConfigError, match=f"{steps} is no number of steps"):
        small(preset, steps=steps)


# A learned vector for each class, in place of its index.


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("grid_size", [1, 4, 7])
def test_a_learned_class_is_added_at_every_place_and_is_one_more_channel(noisy, grid_size, generator):
    """By hand: F_t = F_I + eps_t + e_c, with the same e_c everywhere; at the bottom a linear map of e_c."""
    encoder = small(class_code="learned", grid_size=grid_size)
    embedding, ids = embeddings(generator, 2, grid_size), torch.tensor([255, 3, 1, 3])
    noise = embeddings(generator, 4, grid_size) if noisy else None
    steps = torch.tensor([1, 3, 100, 7])
    prompts = encoder(embedding, ids, noise=noise, timestep=steps)
    vectors = encoder.class_vectors.weight[ids]
    diffused = embedding.repeat_interleave(2, dim=0) + vectors.reshape(4, 256, 1, 1)
    if noisy:
        diffused = diffused + noise / (steps.reshape(4, 1, 1, 1) + 1)
    projected = vectors @ encoder.fc_label.weight.T + encoder.fc_label.bias
    dense, sparse = encoder.unet(diffused, projected.reshape(4, 1, grid_size, grid_size))
    torch.testing.assert_close(prompts.dense, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        prompts.sparse, encoder.token_pool(sparse).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4
    )


def test_only_the_vectors_of_classes_asked_for_learn(generator):
    encoder = small(class_code="learned").requires_grad_(True)
    prompts = encoder(embeddings(generator, 1), torch.tensor([2, 9]))
    (prompts.sparse.sum() + prompts.dense.sum()).backward()
    rows = encoder.class_vectors.weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert rows.tolist() == [2, 9]


def test_learned_classes_without_diffusion_enter_at_the_bottom_alone(generator):
    encoder = small(class_code="learned", diffusion=False)
    seen = record(encoder.unet.enc2)
    encoder(embeddings(generator, 1), torch.tensor([1, 2]))
    assert torch.equal(seen[0][0], seen[0][1])


def test_a_released_network_has_no_learned_classes():
    with pytest.raises(ConfigError, match="class_code is 'scalar' or, with the preset 'paper', 'learned'"):
        small("release", class_code="learned")


def test_an_unknown_class_code_is_refused():
    with pytest.raises(ConfigError, match="not 'number' with 'paper'"):
        small(class_code="number")
