"""SAM's ViT against segment_anything's own class and builders."""

from functools import partial
from typing import Any

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.errors import ConfigError, InputError
from scripts.networks.image_encoders import sam_vit
from scripts.networks.image_encoders.sam_vit import FusedAttention, SamVit, VitSize, sam_vit_encoder

TINY = VitSize(channels=32, blocks=3, heads=2, global_blocks=(1,))
GRIDS = [(1, 1), (3, 5), (8, 2), (7, 7)]
SHARES = [1, 40, 500, 2**19]  # biases for each of two threads: one row of one head, up to all at once


def tiny_reference(image_size: int) -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=image_size,
        patch_size=16,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=4,
        out_chans=256,
        qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=[1],
    )


def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference, relative to the largest value, as the issue asks for."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def attentions(
    grid: tuple[int, int], generator: torch.Generator, *, table: tuple[int, int] | None = None
) -> tuple[FusedAttention, Attention]:
    """Ours and segment_anything's with the same random parameters, tables of relative positions included."""
    reference = Attention(24, num_heads=3, use_rel_pos=True, input_size=table or grid)
    fill(reference, generator)
    fused = FusedAttention(Attention(24, num_heads=3, use_rel_pos=True, input_size=table or grid))
    fused.load_state_dict(reference.state_dict())
    return fused, reference


class LargestTensor(TorchDispatchMode):
    """Notes how many values the largest result of any operation has."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.values = max(self.values, *sizes, 0)
        return result


# The attention.


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_is_that_of_segment_anything(grid, count, share, generator, monkeypatch):
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", share)
    fused, reference = attentions(grid, generator)
    tokens = torch.randn(count, *grid, 24, generator=generator)
    with torch.no_grad():
        assert_close(fused(tokens), reference(tokens), 1e-5)


def test_tables_of_another_grid_are_stretched_as_in_segment_anything(generator):
    fused, reference = attentions((5, 6), generator, table=(7, 4))
    tokens = torch.randn(2, 5, 6, 24, generator=generator)
    with torch.no_grad():
        assert_close(fused(tokens), reference(tokens), 1e-5)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("learning", ["all", "rel_pos", "qkv"])
def test_gradients_are_those_of_segment_anything(learning, share, generator, monkeypatch):
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", share)
    pair = attentions((4, 7), generator)
    tokens = torch.randn(2, 4, 7, 24, generator=generator)
    weights = torch.randn(2, 4, 7, 24, generator=generator)
    gradients = []
    for attention in pair:
        for name, parameter in attention.named_parameters():
            parameter.requires_grad_(learning == "all" or learning in name)
        own = tokens.clone().requires_grad_(learning == "all")
        (attention(own) * weights).sum().backward()
        found = {name: parameter.grad for name, parameter in attention.named_parameters()}
        gradients.append({name: value for name, value in {**found, "tokens": own.grad}.items() if value is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert len(ours) == {"all": 7, "rel_pos": 2, "qkv": 2}[learning]
    for name, expected in theirs.items():
        if name == "qkv.bias":  # that of the keys is zero but for rounding: the softmax takes no notice of it
            assert_close(ours[name][:24], expected[:24])
            assert_close(ours[name][48:], expected[48:])
        else:
            assert_close(ours[name], expected)


def test_the_biases_are_never_held_all_at_a_time(generator, monkeypatch):
    grid, heads = 24, 3
    fused, _ = attentions((grid, grid), generator)
    tokens = torch.randn(1, grid, grid, 24, generator=generator)
    held = 2 * 4 * grid**3  # four rows of queries of one head
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", held // max(2, torch.get_num_threads()))
    with torch.no_grad(), LargestTensor() as largest:
        fused(tokens)
    assert largest.values <= held < heads * grid**4


# The encoder.


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("image_size", [16, 64, 176, 240, 256])  # 240: a grid of 15, which windows of 14 do not divide
def test_output_is_that_of_segment_anything(image_size, count, generator):
    reference = tiny_reference(image_size).eval()
    fill(reference, generator)
    encoder = SamVit(TINY, image_size=image_size).eval()
    encoder.load_state_dict(reference.state_dict())
    image = torch.rand(count, 3, image_size, image_size, generator=generator)
    with torch.no_grad():
        embedding = encoder(image)
        assert_close(embedding, reference(image))
    assert encoder.image_size == image_size
    assert encoder.grid_size == image_size // 16
    assert embedding.shape == (count, 256, image_size // 16, image_size // 16)


def test_training_gives_the_gradients_of_segment_anything(generator):
    reference = tiny_reference(240)
    fill(reference, generator)
    encoder = SamVit(TINY, image_size=240)
    encoder.load_state_dict(reference.state_dict())
    image = torch.rand(1, 3, 240, 240, generator=generator)
    for network in (encoder, reference):
        network.train()(image).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * largest, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("share", [1, 2**19])
def test_loading_before_or_after_eval_is_the_same(share, generator, monkeypatch):
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", share)
    reference = tiny_reference(64).eval()
    encoder = SamVit(TINY, image_size=64).eval()
    image = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        before = encoder(image)
        for _ in range(2):
            fill(reference, generator)
            encoder.load_state_dict(reference.state_dict())
            assert_close(encoder(image), reference(image))
        after = encoder(image)
        assert not torch.allclose(before, after, atol=1e-2)
        for name in ("rel_pos_h", "rel_pos_w"):
            table = 10 * torch.randn(7, 16, generator=generator)
            for network in (encoder, reference):
                network.blocks[1].attn.get_parameter(name).data.copy_(table)
            before, after = after, encoder(image)
            assert_close(after, reference(image))
            assert (after - before).abs().max() > 0.01 * after.abs().max()


def test_half_precision_is_close_to_single(generator):
    encoder = SamVit(TINY, image_size=64).eval()
    fill(encoder, generator)
    image = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        exact = encoder(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = encoder(image)
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_encoder_exports_with_a_free_batch_axis(generator, monkeypatch):
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", 1)  # the graph is whole all the same
    encoder = SamVit(TINY, image_size=240).eval()
    fill(encoder, generator)
    images = torch.rand(2, 3, 240, 240, generator=generator)
    with torch.no_grad():
        free = ({0: torch.export.Dim("batch", min=1, max=8)},)
        program = torch.export.export(encoder, (images,), dynamic_shapes=free)
        assert_close(program.module()(images[:1]), encoder(images[:1]))
    calls = [str(node.target) for node in program.graph.nodes]
    assert sum("scaled_dot_product" in call for call in calls) == TINY.blocks


@pytest.mark.parametrize("variant", ["b", "l", "h"])
def test_names_and_shapes_are_those_of_segment_anything(variant):
    with torch.device("meta"):
        reference = sam_model_registry[f"vit_{variant}"]().image_encoder
        encoder = sam_vit_encoder(variant)
    shapes = [(name, value.shape) for name, value in encoder.state_dict().items()]
    assert shapes == [(name, value.shape) for name, value in reference.state_dict().items()]
    for block, other in zip(encoder.blocks, reference.blocks, strict=True):
        assert (block.window_size, block.attn.num_heads) == (other.window_size, other.attn.num_heads)
        assert block.norm1.eps == other.norm1.eps == 1e-6
    assert (encoder.image_size, encoder.grid_size) == (1024, 64)


def test_vit_b_has_the_published_counts():
    with torch.device("meta"):
        encoder = sam_vit_encoder("b")
    assert len(encoder.state_dict()) == 177
    assert sum(p.numel() for p in encoder.parameters()) == 89_670_912


@pytest.mark.parametrize("image_size", [0, -16, 8, 1000, 1040, 2048])
def test_other_sizes_are_refused_with_the_ones_allowed(image_size):
    with pytest.raises(ConfigError, match=f"multiples of 16 from 16 to 1024, not {image_size}"):
        SamVit(TINY, image_size=image_size)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ConfigError, match="b, l, h, not 'g'"):
        sam_vit_encoder("g")


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (1, 3, 1024, 1024), (1, 1, 64, 64), (3, 64, 64)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"\(B, 3, 64, 64\)"):
        SamVit(TINY, image_size=64)(torch.zeros(shape))


@pytest.mark.slow
def test_full_vit_b_is_that_of_segment_anything(generator):
    reference = sam_model_registry["vit_b"]().image_encoder.eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "pos" in name:  # they begin as zeros
                parameter.normal_(0.0, 0.2, generator=generator)
    encoder = sam_vit_encoder("b").eval()
    encoder.load_state_dict(reference.state_dict())
    image = torch.rand(1, 3, 1024, 1024, generator=generator)
    with torch.no_grad():
        embedding = encoder(image)
        assert embedding.shape == (1, 256, 64, 64)
        assert_close(embedding, reference(image))
