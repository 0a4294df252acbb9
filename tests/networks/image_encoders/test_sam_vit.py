"""SAM's ViT against segment_anything's own class and builders."""

from functools import partial

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT

from scripts.errors import ConfigError, InputError
from scripts.networks.image_encoders.sam_vit import SamVit, VitSize, sam_vit_encoder

TINY = VitSize(channels=32, blocks=3, heads=2, global_blocks=(1,))


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


@pytest.mark.parametrize("image_size", [16, 64, 240])  # 240: a grid of 15, which the windows of 14 do not divide
def test_output_is_that_of_segment_anything(image_size, generator):
    reference = tiny_reference(image_size).eval()
    fill(reference, generator)
    encoder = SamVit(TINY, image_size=image_size).eval()
    encoder.load_state_dict(reference.state_dict())
    image = torch.rand(2, 3, image_size, image_size, generator=generator)
    with torch.no_grad():
        embedding = encoder(image)
        assert torch.equal(embedding, reference(image))
    assert encoder.image_size == image_size
    assert encoder.grid_size == image_size // 16
    assert embedding.shape == (2, 256, image_size // 16, image_size // 16)


@pytest.mark.parametrize("variant", ["b", "l", "h"])
def test_names_and_shapes_are_those_of_segment_anything(variant):
    with torch.device("meta"):
        reference = sam_model_registry[f"vit_{variant}"]().image_encoder
        encoder = sam_vit_encoder(variant)
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    assert shapes == {name: value.shape for name, value in reference.state_dict().items()}
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
    encoder = sam_vit_encoder("b").eval()
    encoder.load_state_dict(reference.state_dict())
    image = torch.rand(1, 3, 1024, 1024, generator=generator)
    with torch.no_grad():
        embedding = encoder(image)
        assert embedding.shape == (1, 256, 64, 64)
        assert torch.equal(embedding, reference(image))
