"""The hierarchical decoder against its description, written out level by level with segment_anything's own parts."""

import copy

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import nn

from scripts.networks.hierarchical_decoder import (
    CoarseMaskPrompt,
    HierarchicalDecoder,
    ImageSelfAttention,
    MaskHead,
    level_neck,
    two_way_transformer,
)
from scripts.networks.image_encoders.sam_vit import SamVit, VitSize

GRID = (3, 5)
LEVELS = 3
MASKS = 3
SWITCHES = [
    {},
    {"deep_residual": True},
    {"final_image_attention": True},
    {"fusion": "mask_prompt"},
    {"fusion": "mask_prompt", "deep_residual": True, "final_image_attention": True},
]


def seeded(build, **settings) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(**settings).requires_grad_(False)


def decoder(**settings) -> HierarchicalDecoder:
    return seeded(HierarchicalDecoder, **{"levels": LEVELS, "masks": MASKS, "upscalings": 3, **settings})


def published(transformer: nn.Module, depth: int) -> TwoWayTransformer:
    """segment_anything's own transformer with the same weights."""
    own = TwoWayTransformer(depth=depth, embedding_dim=256, mlp_dim=2048, num_heads=8)
    own.load_state_dict(transformer.state_dict())
    return own


def inputs(generator: torch.Generator, count: int = 2, prompts: int = 2, levels: int = LEVELS) -> tuple:
    """Features and prompts of each level, positions and the no-mask embedding."""
    features = [torch.randn(count, 256, *GRID, generator=generator) for _ in range(levels)]
    tokens = [torch.randn(count, prompts, 256, generator=generator) for _ in range(levels)]
    positions = torch.randn(1, 256, *GRID, generator=generator)
    return features, tokens, positions, torch.randn(1, 256, 1, 1, generator=generator)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def mask_logits(head: MaskHead, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Each mask by a sum of its own over the channels of the upscaled image."""
    upscaled = head.upscaling(image)
    masks = [
        (head.kernels[index](tokens[:, index])[:, :, None, None] * upscaled).sum(dim=1)
        for index in range(tokens.shape[1])
    ]
    return torch.stack(masks, dim=1)


def written_out(network: HierarchicalDecoder, features, prompts, positions, no_mask, settings) -> torch.Tensor:
    """The decoder for three levels, from the deepest to the shallowest, with segment_anything's transformers."""
    count = len(features[0])
    positions = positions.repeat(count, 1, 1, 1)
    quality, masks = network.quality_token.weight, network.mask_tokens.weight
    own = torch.cat((quality, masks))[None].repeat(count, 1, 1)
    deepest = image = features[2] + no_mask
    for level in (2, 1, 0):
        if level < 2 and settings.get("fusion") == "mask_prompt":
            image = image + network.coarse_masks[level](features[level] + no_mask, prompts[level], positions)
        elif level < 2:
            image = image + features[level]
        if level < 2 and settings.get("deep_residual"):
            image = image + deepest
        given = image
        transformer = published(network.transformers[level], 2)
        tokens, mixed = transformer(given, positions, torch.cat((own, prompts[level]), dim=1))
        own = tokens[:, : 1 + MASKS]
        image = mixed.transpose(1, 2).reshape(given.shape)
    if settings.get("final_image_attention"):
        block = network.image_attention
        flat = given.flatten(2).transpose(1, 2)
        attended = block.attention(q=mixed, k=mixed + flat, v=mixed + flat)
        image = block.norm(mixed + attended).transpose(1, 2).reshape(given.shape)
    return mask_logits(network.head, own[:, 1:], image)


@pytest.mark.parametrize("prompts", [0, 1, 4])
@pytest.mark.parametrize("settings", SWITCHES, ids=lambda settings: "+".join(settings) or "default")
def test_the_decoder_is_as_written_out(settings, prompts, generator):
    network = decoder(**settings)
    given = inputs(generator, prompts=prompts)
    logits = network(*given)
    assert logits.shape == (2, MASKS, 8 * GRID[0], 8 * GRID[1])
    assert_close(logits, written_out(network, *given, settings))


@pytest.mark.parametrize("settings", SWITCHES, ids=lambda settings: "+".join(settings) or "default")
def test_a_batch_is_the_same_one_by_one(settings, generator):
    network = decoder(**settings)
    features, prompts, positions, no_mask = inputs(generator, count=3)
    together = network(features, prompts, positions, no_mask)
    for i in range(3):
        one = slice(i, i + 1)
        alone = network([level[one] for level in features], [own[one] for own in prompts], positions, no_mask)
        assert_close(together[one], alone)


def test_each_switch_changes_the_masks(generator):
    given = inputs(generator)
    answers = []
    for settings in SWITCHES:
        network = decoder(**settings)
        network.load_state_dict(decoder().state_dict(), strict=False)
        answers.append(network(*given))
    for first in range(len(answers)):
        for second in range(first):
            assert (answers[first] - answers[second]).abs().max() > 1e-3


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("which", ["features", "prompts"])
def test_each_level_counts(which, level, generator):
    network = decoder()
    features, prompts, positions, no_mask = inputs(generator)
    before = network(features, prompts, positions, no_mask)
    changed = features if which == "features" else prompts
    changed[level] = changed[level].flip(2)
    assert (network(features, prompts, positions, no_mask) - before).abs().max() > 1e-3


def test_a_single_level_is_a_single_transformer(generator):
    network = decoder(levels=1, fusion="none")
    assert len(network.transformers) == 1
    features, prompts, positions, no_mask = inputs(generator, levels=1)
    image = features[0] + no_mask
    own = torch.cat((network.quality_token.weight, network.mask_tokens.weight)).expand(2, -1, -1)
    transformer = published(network.transformers[0], 2)
    tokens, mixed = transformer(image, positions.repeat(2, 1, 1, 1), torch.cat((own, prompts[0]), dim=1))
    expected = mask_logits(network.head, tokens[:, 1:4], mixed.transpose(1, 2).reshape(image.shape))
    assert_close(network(features, prompts, positions, no_mask), expected)


# The parts.


@pytest.mark.parametrize("depth", [1, 2])
def test_the_transformer_is_segment_anythings(depth, generator):
    transformer = seeded(two_way_transformer, depth=depth)
    image, positions = (torch.randn(2, 256, *GRID, generator=generator) for _ in range(2))
    tokens = torch.randn(2, 4, 256, generator=generator)
    for found, expected in zip(
        transformer(image, positions, tokens), published(transformer, depth)(image, positions, tokens), strict=True
    ):
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(("upscalings", "widths"), [(1, [64]), (2, [64, 32]), (3, [64, 32, 16]), (4, [64, 32, 16, 8])])
@pytest.mark.parametrize("masks", [1, 4])
def test_the_head_doubles_the_resolution_each_time(masks, upscalings, widths, generator):
    head = seeded(MaskHead, masks=masks, upscalings=upscalings)
    tokens, image = torch.randn(2, masks, 256, generator=generator), torch.randn(2, 256, 2, 3, generator=generator)
    logits = head(tokens, image)
    assert logits.shape == (2, masks, 2 * 2**upscalings, 3 * 2**upscalings)
    assert_close(logits, mask_logits(head, tokens, image), 1e-5)
    assert [layer.out_channels for layer in head.upscaling if isinstance(layer, nn.ConvTranspose2d)] == widths
    assert all(kernel.layers[-1].out_features == widths[-1] for kernel in head.kernels)


def test_two_doublings_are_sams_own_upscaling():
    transformer = TwoWayTransformer(depth=1, embedding_dim=256, mlp_dim=16, num_heads=8)
    sam = MaskDecoder(transformer_dim=256, transformer=transformer)
    head = MaskHead(masks=4, upscalings=2)
    assert [type(layer) for layer in head.upscaling] == [type(layer) for layer in sam.output_upscaling]
    head.upscaling.load_state_dict(sam.output_upscaling.state_dict())
    head.kernels.load_state_dict(sam.output_hypernetworks_mlps.state_dict())


def test_the_neck_is_sams_own(generator):
    size = VitSize(channels=32, blocks=1, heads=2, global_blocks=(0,))
    own = SamVit(size, image_size=32).neck
    neck = level_neck(32)
    neck.load_state_dict(own.state_dict())
    features = torch.randn(2, 32, 4, 6, generator=generator)
    assert torch.equal(neck(features), own(features))


def test_the_dense_prompt_is_made_of_the_probabilities_of_coarse_masks(generator):
    part = seeded(CoarseMaskPrompt, masks=MASKS)
    image, positions = (torch.randn(2, 256, *GRID, generator=generator) for _ in range(2))
    prompts = torch.randn(2, 2, 256, generator=generator)
    tokens = torch.cat((part.mask_tokens.weight.repeat(2, 1, 1), prompts), dim=1)
    tokens, mixed = published(part.transformer, 1)(image, positions, tokens)
    masks = mask_logits(part.head, tokens[:, :MASKS], mixed.transpose(1, 2).reshape(image.shape))
    assert masks.shape == (2, MASKS, 4 * GRID[0], 4 * GRID[1])
    shares = masks.exp() / masks.exp().sum(dim=1, keepdim=True)
    dense = part(image, prompts, positions)
    assert dense.shape == (2, 256, *GRID)
    assert_close(dense, part.stem(shares))


def test_image_tokens_attend_to_one_another(generator):
    block = seeded(ImageSelfAttention)
    image, given = (torch.randn(2, 6, 256, generator=generator) for _ in range(2))
    weights = dict(block.attention.named_parameters())
    query, key, value = (
        (rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).reshape(2, 6, 8, 16)  # inner width 128
        for name, rows in (("q_proj", image), ("k_proj", image + given), ("v_proj", image + given))
    )
    scores = torch.einsum("blhc,bmhc->bhlm", query, key) / 4
    mixed = block.attention.out_proj(torch.einsum("bhlm,bmhc->blhc", scores.softmax(dim=3), value).flatten(2))
    assert_close(block(image, given), block.norm(image + mixed), 1e-5)


@pytest.mark.parametrize(
    ("settings", "count"), [({}, 13_509_736), ({"final_image_attention": True}, 13_509_736 + 132_224)]
)
def test_the_counts_of_the_default(settings, count):
    """Four transformers of 3 291 264, the upscaling 76 632, two kernels of 133 640 and three tokens of 256."""
    with torch.device("meta"):
        network = HierarchicalDecoder(levels=4, masks=2, upscalings=4, **settings)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_gradients_reach_every_parameter(generator):
    for settings in SWITCHES:
        network = copy.deepcopy(decoder(**settings)).requires_grad_(True)
        network(*inputs(generator)).square().mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            if not name.endswith("k_proj.bias"):  # the softmax takes no notice of it
                assert parameter.grad.abs().sum() > 0, name
