"""Inference without prompts: the network slice by slice as the reference, and what is asked for of it."""

import pytest
import torch

from scripts.data.fitting import network_slices, restore_from_square
from scripts.data.vocabulary import Vocabulary
from scripts.engines.embedding import open_store
from scripts.engines.prompt_free_inferer import PromptFreeInferer, asked_alone
from scripts.errors import ConfigError
from scripts.networks.hsp_sam import HSPSAM

CLASS_IDS = (2, 5, 7)
SIZE = 32
TOLERANCE = 2e-3  # answers are kept in half precision


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return HSPSAM(image_encoder="compact", image_size=SIZE, class_ids=CLASS_IDS, train_image_encoder=True).eval()


@pytest.fixture
def volume():
    generator = torch.Generator().manual_seed(1)
    return torch.rand((1, 1, 20, 14, 5), generator=generator) * 255


def answer(network, volume, **settings):
    call = {name: settings.pop(name) for name in ("class_ids", "presence") if name in settings}
    with torch.no_grad():
        return PromptFreeInferer(**settings)(volume, network, **call)


def slice_by_slice(network, volume):
    """Logits (1, K, H, W, D) of all classes, one call of the network a slice."""
    slices = []
    for place in range(volume.shape[4]):
        with torch.no_grad():
            square = network(network_slices(volume[0, ..., place : place + 1], SIZE), known_only=True)
        slices.append(restore_from_square(square, size=SIZE, original=tuple(volume.shape[2:4])))
    return torch.stack(slices, dim=-1)


@pytest.mark.parametrize("slices_at_once", [1, 3, 8])
def test_the_answer_is_that_of_the_network_slice_by_slice(network, volume, slices_at_once):
    found = answer(network, volume, slices_at_once=slices_at_once)
    assert found.shape == (1, 3, 20, 14, 5)
    torch.testing.assert_close(found.float(), slice_by_slice(network, volume), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_colour_picture_is_a_volume_of_one_slice(network):
    picture = torch.rand((1, 3, 9, 30, 1), generator=torch.Generator().manual_seed(4)) * 255
    torch.testing.assert_close(
        answer(network, picture).float(), slice_by_slice(network, picture), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_all_channels_are_by_class_id(network, volume):
    with torch.no_grad():
        square = network(network_slices(volume[0], SIZE))
    assert square.shape == (5, 8, SIZE, SIZE)
    restored = restore_from_square(square[:, CLASS_IDS], size=SIZE, original=(20, 14)).permute(1, 2, 3, 0)
    torch.testing.assert_close(answer(network, volume)[0].float(), restored, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("class_ids", [[5], [7, 2]])
def test_what_is_not_asked_for_is_background(network, volume, class_ids):
    """The probability of an asked class is the same, whatever else is asked for."""
    everything = slice_by_slice(network, volume)
    ground = torch.zeros_like(everything[:, :1])
    expected = torch.cat((ground, everything), dim=1).softmax(dim=1)[:, [1 + CLASS_IDS.index(i) for i in class_ids]]
    found = answer(network, volume, class_ids=class_ids).float()
    probability = torch.cat((ground, found), dim=1).softmax(dim=1)[:, 1:]
    torch.testing.assert_close(probability, expected, atol=1e-3, rtol=0)


def test_what_is_asked_alone_by_hand():
    """Probabilities 1/8, 1/8, 2/8 and 4/8 of background and three classes; the last is asked for: odds of 1."""
    logits = torch.tensor([1.0, 2.0, 4.0]).log().reshape(1, 3, 1, 1)
    assert asked_alone(logits, [2]).item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(asked_alone(logits, [2, 0]).flatten(), (torch.tensor([4.0, 1.0]) / 3).log())
    torch.testing.assert_close(asked_alone(logits, [0, 1, 2]), logits)


def test_where_a_class_is_not_asked_for_it_is_absent(network, volume):
    presence = torch.zeros((1, 3, 5), dtype=torch.bool)
    presence[0, 1, 2:4] = True
    found = answer(network, volume, class_ids=CLASS_IDS, presence=presence)
    everything = answer(network, volume)
    torch.testing.assert_close(found[:, 1, ..., 2:4], everything[:, 1, ..., 2:4])
    assert (found[:, [0, 2]] < -1000).all()
    assert (found[:, 1, ..., [0, 1, 4]] < -1000).all()


def test_slices_that_are_alike_are_segmented_once(network, volume, monkeypatch):
    alike = torch.cat((volume, volume[..., 1:2], torch.zeros_like(volume[..., :3])), dim=-1)
    seen = []
    encode = network.encode_levels
    monkeypatch.setattr(network, "encode_levels", lambda image, **options: seen.append(len(image)) or encode(image))
    found = answer(network, alike, slices_at_once=4)
    assert sum(seen) == 6
    assert torch.equal(found[..., 5], found[..., 1])
    assert torch.equal(found[..., 6], found[..., 8])


def test_an_unknown_class_is_named(network, volume):
    with pytest.raises(ConfigError, match=r"segments the classes \[2, 5, 7\], and was asked for \[3\]"):
        answer(network, volume, class_ids=[2, 3])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"samples": 2, "noise_seed": 0}, "draws no noise"),
        ({"smallest_quality": 0.5}, "does not judge its masks"),
        ({"quality": True}, "does not judge its masks"),
        ({"largest_component": True}, "answers as it is"),
        ({"runtime": "onnx"}, "runtime torch alone, not onnx"),
    ],
)
def test_what_the_network_has_not_is_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        PromptFreeInferer(**settings)


def test_its_embeddings_are_not_stored(tmp_path):
    network = HSPSAM(image_encoder="compact", image_size=SIZE)
    with pytest.raises(ConfigError, match="leave embeddings_dir out"):
        open_store(network, tmp_path)


def test_positions_are_not_averaged(bundle_root):
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    with pytest.raises(ConfigError, match="answers as it is: leave averaged_orientations"):
        PromptFreeInferer(averaged_orientations={"CT": "all"}, vocabulary=vocabulary)
