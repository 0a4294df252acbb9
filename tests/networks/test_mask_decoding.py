"""The mask decoder for prompts of many images, against segment_anything's own, one image and one prompt at a time."""

import copy

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from scripts.networks import pieces
from scripts.networks.mask_decoding import (
    DetailedMaskDecoder,
    PromptMaskDecoder,
    build_mask_decoder,
    build_prompt_encoder,
    packed_channels,
)
from scripts.networks.prompts import PromptEmbeddings

GRID = 4
PUBLISHED_PARAMETERS = {"mask_decoder": 4_058_340, "prompt_encoder": 6_220}


@pytest.fixture(scope="module")
def decoder() -> PromptMaskDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_mask_decoder().requires_grad_(False)


@pytest.fixture(scope="module")
def sam(decoder: PromptMaskDecoder) -> MaskDecoder:
    """SAM's own decoder with the same weights."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    own = MaskDecoder(transformer_dim=256, transformer=transformer)
    own.load_state_dict(decoder.state_dict())
    return own.requires_grad_(False)


def positions() -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_prompt_encoder(grid_size=GRID, image_size=64).get_dense_pe()


def random_prompts(generator: torch.Generator, count: int, tokens: int = 2) -> PromptEmbeddings:
    sparse = torch.randn((count, tokens, 256), generator=generator)
    return PromptEmbeddings(sparse, torch.randn((count, 256, GRID, GRID), generator=generator))


def one_by_one(sam: MaskDecoder, images: torch.Tensor, prompts: PromptEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt i over image i by segment_anything's published call, a batch of one each."""
    answers = [
        sam(
            image_embeddings=images[i : i + 1],
            image_pe=positions(),
            sparse_prompt_embeddings=prompts.sparse[i : i + 1],
            dense_prompt_embeddings=prompts.dense[i : i + 1],
            multimask_output=False,
        )
        for i in range(len(images))
    ]
    return torch.cat([masks[:, 0] for masks, _ in answers]), torch.cat([quality[:, 0] for _, quality in answers])


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_images_is_sams_own_decoder_one_by_one(decoder, sam, count, generator):
    images = torch.randn((count, 256, GRID, GRID), generator=generator)
    prompts = random_prompts(generator, count)
    logits, quality = decoder(images, positions(), prompts)
    expected_logits, expected_quality = one_by_one(sam, images, prompts)
    assert logits.shape == (count, 4 * GRID, 4 * GRID)
    assert quality.shape == (count,)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality, expected_quality, rtol=1e-4, atol=1e-5)


def test_several_images_with_several_prompts_each(decoder, sam, generator):
    images = torch.randn((2, 256, GRID, GRID), generator=generator).repeat_interleave(3, dim=0)
    prompts = random_prompts(generator, 6)
    logits, quality = decoder(images, positions(), prompts)
    expected_logits, expected_quality = one_by_one(sam, images, prompts)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality, expected_quality, rtol=1e-4, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # the prompts differ
    assert (logits[0] - logits[3]).abs().max() > 1e-3  # and so do the images


def test_the_prompts_of_one_image_are_sams_own_call_for_many_prompts(decoder, sam, generator):
    image = torch.randn((1, 256, GRID, GRID), generator=generator)
    prompts = random_prompts(generator, 3)
    masks, quality = sam(image, positions(), prompts.sparse, prompts.dense, multimask_output=False)
    logits, own_quality = decoder(image.expand(3, -1, -1, -1), positions(), prompts)
    torch.testing.assert_close(logits, masks[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own_quality, quality[:, 0], rtol=1e-4, atol=1e-5)


def test_a_batch_gives_what_its_rows_give_alone(decoder, generator):
    images = torch.randn((3, 256, GRID, GRID), generator=generator)
    prompts = random_prompts(generator, 3)
    logits, quality = decoder(images, positions(), prompts)
    for i in range(3):
        row = slice(i, i + 1)
        alone = decoder(images[row], positions(), PromptEmbeddings(prompts.sparse[row], prompts.dense[row]))
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quality[row], alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 5000, 2**20])
@pytest.mark.parametrize(("images", "per_image"), [(1, 1), (1, 13), (2, 3), (4, 1)])
def test_an_image_is_given_once_for_all_its_prompts(decoder, sam, images, per_image, piece, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    embedding = torch.randn((images, 256, GRID, GRID), generator=generator)
    prompts = random_prompts(generator, images * per_image)
    repeated = embedding.repeat_interleave(per_image, dim=0)
    with torch.no_grad():
        logits, quality = decoder(embedding, positions(), prompts)
        expected_logits, expected_quality = one_by_one(sam, repeated, prompts)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality, expected_quality, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_sams_own_decoder(decoder, sam, generator):
    image = torch.randn((1, 256, GRID, GRID), generator=generator)
    prompts = random_prompts(generator, 3)
    weights = torch.randn((3, 4 * GRID, 4 * GRID), generator=generator)
    found = []
    for network in (decoder, sam):
        own = copy.deepcopy(network).requires_grad_(True)
        leaves = [value.clone().requires_grad_(True) for value in (image, *prompts)]
        if network is decoder:
            logits, quality = own(leaves[0], positions(), PromptEmbeddings(*leaves[1:]))
        else:
            masks, qualities = own(leaves[0], positions(), *leaves[1:], multimask_output=False)
            logits, quality = masks[:, 0], qualities[:, 0]
        ((logits * weights).sum() + quality.sum()).backward()
        gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
        found.append({**gradients, **{str(i): leaf.grad for i, leaf in enumerate(leaves)}})
    ours, theirs = found
    largest = max(value.abs().max() for value in theirs.values() if value is not None)
    for name, expected in theirs.items():
        if ours[name] is None:  # of the masks that are not asked for
            assert expected is None or not expected.any(), name
        else:
            assert (ours[name] - expected).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_tokens(decoder, sam, tokens, generator):
    images = torch.randn((2, 256, GRID, GRID), generator=generator)
    prompts = random_prompts(generator, 2, tokens)
    logits, _ = decoder(images, positions(), prompts)
    torch.testing.assert_close(logits, one_by_one(sam, images, prompts)[0], rtol=1e-4, atol=1e-5)


def test_a_grid_that_is_not_square(decoder, sam, generator):
    image = torch.randn((1, 256, 2, 5), generator=generator)
    place = torch.randn((1, 256, 2, 5), generator=generator)
    sparse, dense = torch.randn((1, 2, 256), generator=generator), torch.randn((1, 256, 2, 5), generator=generator)
    logits, _ = decoder(image, place, PromptEmbeddings(sparse, dense))
    masks, _ = sam(image, place, sparse, dense, multimask_output=False)
    assert logits.shape == (1, 8, 20)
    torch.testing.assert_close(logits, masks[:, 0], rtol=1e-4, atol=1e-5)


def test_names_and_shapes_are_those_of_the_published_parts():
    with torch.device("meta"):
        own = {
            "mask_decoder": build_mask_decoder(),
            "prompt_encoder": build_prompt_encoder(grid_size=64, image_size=256),
        }
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        published = {
            "mask_decoder": MaskDecoder(transformer_dim=256, transformer=transformer),
            "prompt_encoder": PromptEncoder(256, (64, 64), (256, 256), 16),
        }
    for part, module in own.items():
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        assert shapes == {name: value.shape for name, value in published[part].state_dict().items()}
        assert sum(parameter.numel() for parameter in module.parameters()) == PUBLISHED_PARAMETERS[part]


def test_the_prompt_encoder_knows_the_frame_of_the_boxes():
    encoder = build_prompt_encoder(grid_size=4, image_size=96)
    assert encoder.input_image_size == (96, 96)
    assert encoder.get_dense_pe().shape == (1, 256, 4, 4)


# The positional encoding, kept.


def fresh_encoding(encoder: PromptEncoder, grid: int = GRID) -> torch.Tensor:
    """By segment_anything's own class, with the same matrix."""
    own = PromptEncoder(256, (grid, grid), (64, 64), 16)
    own.pe_layer.positional_encoding_gaussian_matrix = encoder.pe_layer.positional_encoding_gaussian_matrix.clone()
    return own.get_dense_pe()


def test_the_positional_encoding_is_sams_and_made_once():
    encoder = build_prompt_encoder(grid_size=GRID, image_size=64)
    first = encoder.get_dense_pe()
    torch.testing.assert_close(first, fresh_encoding(encoder))
    assert encoder.get_dense_pe() is first
    assert "kept" not in " ".join(encoder.state_dict())


def test_the_positional_encoding_follows_its_matrix():
    encoder = build_prompt_encoder(grid_size=GRID, image_size=64).eval()
    other = build_prompt_encoder(grid_size=GRID, image_size=64)

    def check() -> None:
        torch.testing.assert_close(encoder.get_dense_pe(), fresh_encoding(encoder))

    check()
    before = encoder.get_dense_pe()
    encoder.load_state_dict(other.state_dict())
    check()
    assert not torch.allclose(before, encoder.get_dense_pe())
    encoder.pe_layer.positional_encoding_gaussian_matrix.data.mul_(0.5)  # what no version counter shows
    check()
    encoder.load_state_dict(build_prompt_encoder(grid_size=GRID, image_size=64).state_dict(), assign=True)
    check()
    copied = copy.deepcopy(encoder)
    copied.load_state_dict(other.state_dict())
    torch.testing.assert_close(copied.get_dense_pe(), other.get_dense_pe())
    check()


def test_an_encoding_made_in_inference_is_fit_for_training(decoder, generator):
    encoder = build_prompt_encoder(grid_size=GRID, image_size=64)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        made = encoder.get_dense_pe()
    assert made.dtype == torch.float32
    torch.testing.assert_close(encoder.get_dense_pe(), fresh_encoding(encoder))
    assert encoder.get_dense_pe() is made
    learning = copy.deepcopy(decoder).requires_grad_(True)
    logits, _ = learning(torch.randn((1, 256, GRID, GRID), generator=generator), made, random_prompts(generator, 2))
    logits.sum().backward()
    assert learning.transformer.layers[0].cross_attn_token_to_image.k_proj.weight.grad.abs().sum() > 0


def test_another_device_has_its_own_encoding():
    encoder = build_prompt_encoder(grid_size=GRID, image_size=64)
    kept = encoder.get_dense_pe()
    encoder.to("meta")
    assert encoder.get_dense_pe().device.type == "meta"
    encoder.to_empty(device="cpu").load_state_dict(build_prompt_encoder(grid_size=GRID, image_size=64).state_dict())
    assert not torch.allclose(encoder.get_dense_pe(), kept)
    torch.testing.assert_close(encoder.get_dense_pe(), fresh_encoding(encoder))


# --- details of the image encoder

DETAILS = (3, 2)  # channels at twice and at four times the grid
PACKED = 4 * 3 + 16 * 2


def detailed_decoder(*, shaken: bool) -> DetailedMaskDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = build_mask_decoder(detail_channels=DETAILS).requires_grad_(False)
        if shaken:
            for values in decoder.details.parameters():
                torch.nn.init.normal_(values, std=0.3)
    return decoder


def test_packed_channels_are_counted():
    assert packed_channels(DETAILS) == PACKED
    assert packed_channels(()) == 0


def test_before_anything_is_learned_it_is_sams_decoder(decoder, generator):
    detailed = detailed_decoder(shaken=False)
    detailed.load_state_dict({**detailed.state_dict(), **decoder.state_dict()})
    images, prompts = torch.randn((2, 256 + PACKED, GRID, GRID), generator=generator), random_prompts(generator, 2)
    found, expected = detailed(images, positions(), prompts), decoder(images[:, :256], positions(), prompts)
    for values, others in zip(found, expected, strict=True):
        assert torch.equal(values, others)


def test_details_of_several_images_are_the_same_one_by_one(generator):
    detailed = detailed_decoder(shaken=True)
    images, prompts = torch.randn((2, 256 + PACKED, GRID, GRID), generator=generator), random_prompts(generator, 6)
    logits, quality = detailed(images, positions(), prompts)
    for i in range(6):
        one = PromptEmbeddings(prompts.sparse[i : i + 1], prompts.dense[i : i + 1])
        alone, of_alone = detailed(images[i // 3 : i // 3 + 1], positions(), one)
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(quality[i : i + 1], of_alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 10), (15, 15)])
def test_a_fine_detail_changes_its_pixel_of_the_mask_alone(row, column, generator):
    """One value of a fine map, packed as `pixel_unshuffle` does, border included."""
    detailed, prompts = detailed_decoder(shaken=True), random_prompts(generator, 1)
    image = torch.randn((1, 256 + PACKED, GRID, GRID), generator=generator)
    before, of_before = detailed(image, positions(), prompts)
    image[0, 256 + 12 + 16 + 4 * (row % 4) + column % 4, row // 4, column // 4] += 1.0  # of the second fine map
    after, of_after = detailed(image, positions(), prompts)
    assert ((after - before)[0].abs() > 1e-6).nonzero().tolist() == [[row, column]]
    assert torch.equal(of_before, of_after)


def test_a_coarse_detail_changes_four_pixels(generator):
    """The normalisation between the two steps is over channels, so that nothing spreads further."""
    detailed, prompts = detailed_decoder(shaken=True), random_prompts(generator, 1)
    image = torch.randn((1, 256 + PACKED, GRID, GRID), generator=generator)
    before, _ = detailed(image, positions(), prompts)
    image[0, 256 + 4 * 2 + 2 * 1 + 0, 1, 3] += 1.0  # third coarse map, row 2 * 1 + 1, column 2 * 3 + 0
    after, _ = detailed(image, positions(), prompts)
    changed = ((after - before)[0].abs() > 1e-6).nonzero()
    assert changed.tolist() == [[6, 12], [6, 13], [7, 12], [7, 13]]
