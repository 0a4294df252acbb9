"""The compact encoder: shapes, cost, and that an image's embedding does not depend on its batch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.errors import ConfigError, InputError
from scripts.networks.image_encoders.compact import CompactEncoder, DetailedCompactEncoder

MOST_PARAMETERS = 3_000_000
MOST_OPERATIONS = 1.5e9  # at 128 pixels, a multiplication and an addition counted as two


def small(*, size: int = 32, stride: int = 8) -> CompactEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CompactEncoder(image_size=size, stride=stride)
        torch.nn.init.normal_(encoder.position)
    return encoder


@pytest.mark.parametrize("size", [16, 32, 96])
@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("count", [1, 2])
def test_shapes(size, stride, count, generator):
    encoder = small(size=size, stride=stride)
    embedding = encoder(torch.rand((count, 3, size, size), generator=generator))
    assert (encoder.image_size, encoder.grid_size) == (size, size // stride)
    assert embedding.shape == (count, 256, size // stride, size // stride)
    assert torch.isfinite(embedding).all()


def test_the_defaults():
    encoder = CompactEncoder()
    assert (encoder.image_size, encoder.grid_size) == (128, 16)


@pytest.mark.parametrize("stride", [4, 8])
def test_parameters_and_operations_stay_small(stride):
    with torch.device("meta"):
        encoder = CompactEncoder(image_size=128, stride=stride)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.zeros(1, 3, 128, 128))
    assert 1e6 < sum(parameter.numel() for parameter in encoder.parameters()) <= MOST_PARAMETERS
    assert 1e8 < counter.get_total_flops() <= MOST_OPERATIONS


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_batch_gives_what_its_images_give_alone(stride, mode, generator):
    encoder = small(stride=stride).train(mode)
    images = torch.rand((3, 3, 32, 32), generator=generator)
    images[1] *= 0.01
    together = encoder(images)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], encoder(images[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_give_the_same_and_leave_no_trace(generator):
    encoder = small()
    images = torch.rand((2, 3, 32, 32), generator=generator)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.testing.assert_close(encoder.train()(images), encoder.eval()(images))
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_a_black_image_is_embedded(generator):
    embedding = small()(torch.zeros(1, 3, 32, 32))
    assert torch.isfinite(embedding).all()


@pytest.mark.parametrize("stride", [4, 8])
def test_fine_detail_needs_no_way_through_the_deep_stages(stride, generator):
    encoder = small(stride=stride).requires_grad_(False)
    for lateral in encoder.lateral:  # nothing deep comes down
        lateral.weight.zero_()
        lateral.bias.zero_()
    first, second = encoder(torch.rand((2, 3, 32, 32), generator=generator))
    assert (first - second).abs().max() > 0.1


def test_the_position_acts_at_its_own_place():
    encoder, picture = small(size=64, stride=8), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(picture)
        encoder.position[..., 0, 3] += 5  # of a grid of 4 x 4: the upper right
        change = (encoder(picture) - before).abs().sum(dim=1)[0]
    row, column = divmod(int(change.argmax()), 8)
    assert row < 2
    assert column >= 6


@pytest.mark.parametrize("stride", [4, 8])
def test_every_parameter_learns(stride, generator):
    encoder = small(stride=stride)
    encoder(torch.rand((2, 3, 32, 32), generator=generator)).square().mul(
        torch.arange(256.0)[:, None, None]
    ).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [0, 8, -16, 50, 100])
def test_a_size_that_the_stages_cannot_halve_is_refused(size):
    with pytest.raises(ConfigError, match=f"multiples of 16, not {size}"):
        CompactEncoder(image_size=size)


@pytest.mark.parametrize("stride", [1, 2, 16])
def test_another_stride_is_refused(stride):
    with pytest.raises(ConfigError, match=f"stride 4 or 8, not {stride}"):
        CompactEncoder(stride=stride)


@pytest.mark.parametrize("shape", [(1, 3, 48, 48), (1, 3, 32, 16), (1, 1, 32, 32), (3, 32, 32)])
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"expects \(B, 3, 32, 32\), got"):
        small()(torch.zeros(shape))


# --- with details


def detailed(*, size: int = 32) -> DetailedCompactEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = DetailedCompactEncoder(image_size=size)
        torch.nn.init.normal_(encoder.position)
    return encoder


def test_the_embedding_proper_is_that_of_the_plain_encoder(generator):
    encoder, plain = detailed(), CompactEncoder(image_size=32)
    plain.load_state_dict({name: value for name, value in encoder.state_dict().items() if "details" not in name})
    images = torch.rand((2, 3, 32, 32), generator=generator)
    embedding = encoder(images)
    assert embedding.shape == (2, 256 + 4 * 32 + 16 * 16, 4, 4)
    assert torch.equal(embedding[:, :256], plain(images))


def test_details_are_where_the_image_has_them(generator):
    """Packed channel c of cell (i, j) holds pixel (4 i + a, 4 j + b) of fine map c // 16, with a, b of c % 16."""
    encoder = detailed()
    images = torch.rand((1, 3, 32, 32), generator=generator)
    (first, second, *_), embedding = encoder.levels(images, []), encoder(images)
    coarse, fine = encoder.details[0](second.features), encoder.details[1](first.features)
    for channel, row, column in ((0, 0, 0), (5, 7, 2), (31, 3, 6)):
        packed = 256 + 4 * channel + 2 * (row % 2) + column % 2
        torch.testing.assert_close(embedding[0, packed, row // 2, column // 2], coarse[0, channel, row, column])
    for channel, row, column in ((0, 0, 0), (7, 13, 2), (15, 6, 15)):
        packed = 256 + 128 + 16 * channel + 4 * (row % 4) + column % 4
        torch.testing.assert_close(embedding[0, packed, row // 4, column // 4], fine[0, channel, row, column])


def test_a_detailed_batch_gives_what_its_images_give_alone(generator):
    encoder, images = detailed(), torch.rand((3, 3, 32, 32), generator=generator)
    together = encoder(images)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], encoder(images[i : i + 1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 32, 48), (1, 1, 32, 32), (3, 32, 32)])
def test_a_detailed_encoder_refuses_other_images(shape):
    with pytest.raises(InputError):
        detailed()(torch.zeros(shape))
