"""TinyViT against reference outputs of the published code, and its own rules."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scripts.errors import ConfigError, InputError
from scripts.networks import pieces
from scripts.networks.image_encoders.tiny_vit import (
    ConvNorm,
    Perceptron,
    SeparableConvolutions,
    TinyViT,
    WindowAttention,
    lite_medsam_encoder,
    mobile_sam_encoder,
    offset_indices,
)

BUILDERS = {"lite_medsam": lite_medsam_encoder, "mobile_sam": mobile_sam_encoder}
both = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def golden(shared: Path, name: str) -> dict:
    return json.loads((shared / "golden" / f"{name}_encoder.json").read_text())


def seeded(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The value that the reference outputs were computed with (README of the golden folder)."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("num_batches_tracked"):
        value = np.zeros(shape)
    elif name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) <= 1:
        value = rng.normal(0, 0.1, shape) + name.endswith("weight")
    else:
        value = rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def seeded_state(encoder: torch.nn.Module, seed: int = 3) -> dict[str, torch.Tensor]:
    return {name: seeded(name, tuple(value.shape), seed) for name, value in encoder.state_dict().items()}


def small(build: Callable[..., TinyViT], seed: int = 3) -> TinyViT:
    """An encoder with seeded weights on 48 pixels: windows both fill and overlap its grids."""
    encoder = build(image_size=48)
    encoder.load_state_dict(seeded_state(encoder, seed))
    return encoder.eval()


@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_shapes_are_those_of_the_published_file(shared, name):
    published = {key: tuple(shape) for key, shape in golden(shared, name)["shapes"].items()}
    state = BUILDERS[name](image_size=64).state_dict()  # no shape depends on the image's size
    assert {key: tuple(value.shape) for key, value in state.items()} == published
    assert list(state) == list(published)


@pytest.mark.parametrize("name", BUILDERS)
def test_output_matches_the_reference(shared, name):
    facts = golden(shared, name)
    encoder = BUILDERS[name]().eval()  # before loading, on purpose: the biases must not go stale
    encoder.load_state_dict({key: seeded(key, tuple(shape), facts["seed"]) for key, shape in facts["shapes"].items()})
    side = facts["image_size"]
    image = np.random.default_rng([facts["seed"], 7]).uniform(0, 1, (1, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        embedding = encoder(torch.from_numpy(image))
    assert list(embedding.shape) == facts["output_shape"] == [1, 256, encoder.grid_size, encoder.grid_size]
    expected = np.load(shared / "golden" / f"{name}_encoder.npz")["output_stride8"]
    np.testing.assert_allclose(embedding[0, :, ::8, ::8].numpy(), expected, rtol=0, atol=1e-4)
    assert embedding.mean().item() == pytest.approx(facts["output_mean"], abs=1e-5)
    assert embedding.std().item() == pytest.approx(facts["output_std"], abs=1e-5)


def test_parameter_counts_are_the_published_ones():
    assert sum(p.numel() for p in lite_medsam_encoder().parameters()) == 5_726_740
    # 3x3 in place of 1x1 in the patch embedding, and the classifier with its norm
    kernels = 8 * (3 * 32 + 32 * 64)
    classifier = 2 * 320 + 320 * 1000 + 1000
    assert sum(p.numel() for p in mobile_sam_encoder().parameters()) == 5_726_740 + kernels + classifier


def test_offset_indices_follow_the_offsets_met_in_row_major_order():
    window = 4
    points = [(row, column) for row in range(window) for column in range(window)]
    numbers: dict[tuple[int, int], int] = {}
    expected = [
        [numbers.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(numbers)) for b in points] for a in points
    ]
    assert offset_indices(window).tolist() == expected


def test_attention_is_softmax_of_scaled_products_plus_bias(generator):
    attention = WindowAttention(channels=12, heads=3, window=2).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(generator=generator)
    tokens = torch.randn(2, 4, 12, generator=generator)
    projected = attention.qkv(attention.norm(tokens))
    mixed = []
    for head in range(3):
        query, key, value = projected[..., 12 * head : 12 * head + 12].split(4, dim=-1)
        bias = attention.attention_biases[head][attention.attention_bias_idxs]
        mixed.append((query @ key.transpose(1, 2) / 2.0 + bias).softmax(dim=-1) @ value)  # 2 = sqrt(4 channels)
    torch.testing.assert_close(attention(tokens), attention.proj(torch.cat(mixed, dim=-1)), rtol=1e-4, atol=1e-4)


# Batch normalisation, folded outside training.


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill parameters and statistics with values as far from their beginnings as trained ones are."""
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("running_var"):
                value.uniform_(0.2, 3.0, generator=generator)
            elif value.is_floating_point():
                value.normal_(0.0, 0.5, generator=generator)


def random_layer(generator: torch.Generator, **settings) -> ConvNorm:
    layer = ConvNorm(4, 6 if settings.get("groups", 1) == 1 else 8, **settings)
    randomise(layer, generator)
    return layer


LAYERS = [{}, {"kernel": 3}, {"kernel": 3, "stride": 2}, {"kernel": 3, "groups": 4}]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("settings", LAYERS)
def test_outside_training_the_normalisation_is_part_of_the_convolution(settings, count, generator):
    layer = random_layer(generator, **settings).eval()
    features = torch.randn(count, 4, 5, 8, generator=generator)
    fused = fuse_conv_bn_eval(layer.c, layer.bn)
    weight, bias = layer.folded()
    torch.testing.assert_close(weight, fused.weight)
    torch.testing.assert_close(bias, fused.bias)
    torch.testing.assert_close(layer(features), fused(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(features), layer.bn(layer.c(features)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", LAYERS)
def test_the_gradient_passes_through_the_folded_layer(settings, generator):
    layer = random_layer(generator, **settings).eval()
    features = torch.randn(2, 4, 5, 8, generator=generator)
    own, plain = layer(features), layer.bn(layer.c(features))
    weights = torch.randn(own.shape, generator=generator)
    parameters = list(layer.parameters())
    assert len(parameters) == 3
    expected = torch.autograd.grad((plain * weights).sum(), parameters)
    found = torch.autograd.grad((own * weights).sum(), parameters)
    for name, ours, theirs in zip(("weight", "scale", "shift"), found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_in_training_the_batch_decides(generator):
    layer, features = random_layer(generator).train(), 5 + torch.randn(2, 4, 5, 8, generator=generator)
    before = layer.bn.running_mean.clone()
    expected = nn.functional.batch_norm(
        layer.c(features), None, None, layer.bn.weight, layer.bn.bias, training=True, eps=layer.bn.eps
    )
    torch.testing.assert_close(layer(features), expected)
    assert not torch.equal(layer.bn.running_mean, before)


def test_a_normalisation_kept_in_eval_alone_is_folded(generator):
    layer, features = random_layer(generator).train(), torch.randn(2, 4, 5, 8, generator=generator)
    layer.bn.eval()
    before = layer.bn.running_mean.clone()
    torch.testing.assert_close(layer(features), fuse_conv_bn_eval(layer.c.eval(), layer.bn)(features))
    assert torch.equal(layer.bn.running_mean, before)


@torch.no_grad()
def test_nothing_folded_goes_stale(generator):
    layer, features = random_layer(generator).eval(), torch.randn(2, 4, 5, 8, generator=generator)

    def check() -> None:
        torch.testing.assert_close(layer(features), layer.bn(layer.c(features)), rtol=1e-4, atol=1e-5)

    check()
    layer.load_state_dict(random_layer(generator).state_dict())
    check()
    layer.train()(features + 9)  # moves the statistics
    layer.eval()
    check()
    for value in (layer.c.weight, layer.bn.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var):
        value.data.mul_(1.7)
        check()
    layer.load_state_dict(random_layer(generator).state_dict(), assign=True)
    check()


# In pieces.

PIECES = [1, 300, 1000, 10**9]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 1, 5), (3, 3, 9, 4), (1, 3, 16, 3), (2, 3, 7, 1)])
def test_convolutions_in_bands_are_those_of_the_whole(shape, stride, piece, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    module = SeparableConvolutions(3, 12, 5, stride=stride).eval()
    randomise(module, generator)
    features = torch.randn(shape, generator=generator)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = features.contiguous(memory_format=memory_format)
        whole = module(features)
        assert whole.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(module(features), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("piece", PIECES)
def test_the_perceptron_in_pieces_is_that_of_all_tokens(piece, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    perceptron = Perceptron(8)
    tokens = torch.randn(2, 3, 7, 8, generator=generator)
    with torch.no_grad():
        found = perceptron(tokens)
    torch.testing.assert_close(found, perceptron(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("piece", [1, 20_000])
@both
def test_the_encoder_in_pieces_is_the_encoder(build, piece, count, generator, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_VALUES", piece)
    encoder = small(build)
    image = torch.rand(count, 3, 48, 48, generator=generator)
    whole = encoder(image)
    with torch.no_grad():
        found = encoder(image)
    assert (found - whole).abs().max() <= 1e-4 * whole.abs().max()


@both
def test_loading_before_or_after_eval_is_the_same(build, generator):
    image = torch.rand(1, 3, 48, 48, generator=generator)
    late = build(image_size=48).eval()
    with torch.no_grad():
        before = late(image)
        late.load_state_dict(small(build).state_dict())
        after, expected = late(image), small(build)(image)
    assert torch.equal(after, expected)
    assert not torch.allclose(before, after, atol=1e-2)


def test_a_change_of_the_biases_shows_at_once(generator):
    encoder = small(lite_medsam_encoder)
    image = torch.rand(1, 3, 48, 48, generator=generator)
    with torch.no_grad():
        before = encoder(image)
        encoder.layers[3].blocks[1].attn.attention_biases += torch.randn(10, 49, generator=generator)
        assert not torch.allclose(encoder(image), before, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "image_size", "grid"),
    [
        (lite_medsam_encoder, 4, 1),
        (lite_medsam_encoder, 36, 9),
        (lite_medsam_encoder, 64, 16),
        (mobile_sam_encoder, 16, 1),
        (mobile_sam_encoder, 144, 9),
        (mobile_sam_encoder, 256, 16),
    ],
)
def test_smaller_sizes_give_smaller_grids(build, image_size, grid):
    encoder = build(image_size=image_size).eval()
    with torch.no_grad():
        embedding = encoder(torch.zeros(2, 3, image_size, image_size))
    assert encoder.image_size == image_size
    assert encoder.grid_size == grid
    assert embedding.shape == (2, 256, grid, grid)
    assert torch.isfinite(embedding).all()


@pytest.mark.parametrize(
    ("build", "image_size", "allowed"),
    [
        (lite_medsam_encoder, 0, "4"),
        (lite_medsam_encoder, -4, "4"),
        (lite_medsam_encoder, 254, "4"),
        (mobile_sam_encoder, 8, "16"),
        (mobile_sam_encoder, 1000, "16"),
    ],
)
def test_other_sizes_are_refused_with_the_ones_allowed(build, image_size, allowed):
    with pytest.raises(ConfigError, match=f"multiples of {allowed}, not {image_size}"):
        build(image_size=image_size)


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 3, 64, 64), (1, 1, 48, 48), (3, 48, 48)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"\(B, 3, 48, 48\)"):
        lite_medsam_encoder(image_size=48)(torch.zeros(shape))


@both
def test_a_batch_is_its_images_one_by_one(build, generator):
    encoder = small(build)
    images = torch.rand(3, 3, 48, 48, generator=generator)
    with torch.no_grad():
        singly = torch.cat([encoder(image[None]) for image in images])
        torch.testing.assert_close(encoder(images), singly, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_keep_their_places(generator):
    """A change in the lower left corner shows most in the lower left of the embedding."""
    encoder = lite_medsam_encoder(image_size=112)
    encoder.load_state_dict(seeded_state(encoder))
    encoder.eval()
    image = torch.rand(1, 3, 112, 112, generator=generator)
    changed = image.clone()
    changed[..., 96:, :16] = 1.0 - changed[..., 96:, :16]
    with torch.no_grad():
        difference = (encoder(image) - encoder(changed)).abs().sum(dim=1)[0]  # (28, 28)
    row, column = divmod(int(difference.argmax()), 28)
    assert row >= 22
    assert column < 6


def test_the_classifier_of_mobile_sam_lies_idle(generator):
    encoder = small(mobile_sam_encoder)
    image = torch.rand(1, 3, 48, 48, generator=generator)
    idle = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert idle == ["norm_head.weight", "norm_head.bias", "head.weight", "head.bias"]
    with torch.no_grad():
        before = encoder(image)
        for name in idle:
            encoder.get_parameter(name).fill_(float("nan"))
        assert torch.equal(encoder(image), before)


def test_every_parameter_learns(generator):
    encoder = small(lite_medsam_encoder).train()
    encoder(torch.rand(2, 3, 48, 48, generator=generator)).square().mean().backward()
    still = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_half_precision_is_close_to_single(generator):
    encoder = small(lite_medsam_encoder)
    image = torch.rand(1, 3, 48, 48, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(image)
    with torch.no_grad():
        assert (half.float() - encoder(image)).abs().mean() < 0.05


def test_the_encoder_exports_with_a_free_batch_axis(generator):
    encoder = lite_medsam_encoder(image_size=12).eval()
    images = torch.rand(2, 3, 12, 12, generator=generator)
    program = torch.export.export(encoder, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images[:1]), encoder(images[:1]), rtol=1e-4, atol=1e-5)
