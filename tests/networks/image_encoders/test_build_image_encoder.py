"""The image encoders by name."""

import pytest
import torch

from scripts.errors import ConfigError
from scripts.networks.image_encoders import IMAGE_ENCODERS, build_image_encoder
from scripts.networks.mask_decoding import packed_channels

PUBLISHED = {
    "compact": (128, 16),
    "compact_detailed": (128, 16),
    "lite_medsam": (256, 64),
    "mobile_sam": (1024, 64),
    "sam_vit_b": (1024, 64),
    "sam_vit_l": (1024, 64),
    "sam_vit_h": (1024, 64),
}


def test_the_names_are_these():
    assert list(IMAGE_ENCODERS) == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_size_it_is_the_published_one(name):
    with torch.device("meta"):  # no memory for the large ones
        encoder = build_image_encoder(name)
    assert (encoder.image_size, encoder.grid_size) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["compact", "lite_medsam", "mobile_sam", "sam_vit_b"])
def test_every_encoder_keeps_the_contract_at_a_small_size(name):
    encoder = build_image_encoder(name, image_size=32).eval()
    with torch.no_grad():
        embedding = encoder(torch.zeros(2, 3, 32, 32))
    assert encoder.image_size == 32
    assert embedding.shape == (2, 256, encoder.grid_size, encoder.grid_size)


def test_details_come_behind_the_256_channels():
    encoder = build_image_encoder("compact_detailed", image_size=32).eval()
    with torch.no_grad():
        embedding = encoder(torch.zeros(2, 3, 32, 32))
    channels = 256 + packed_channels(encoder.detail_channels)
    assert embedding.shape == (2, channels, encoder.grid_size, encoder.grid_size)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError,
        match="compact, compact_detailed, lite_medsam, mobile_sam, sam_vit_b, sam_vit_l, sam_vit_h, not 'vit'",
    ):
        build_image_encoder("vit")


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_impossible_size_is_refused(name):
    with torch.device("meta"), pytest.raises(ConfigError, match="not 50"):
        build_image_encoder(name, image_size=50)
