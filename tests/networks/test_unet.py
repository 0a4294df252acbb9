"""The U-Net that AutoMedSAM is compared with: which channel answers which question."""

import pytest
import torch
from monai.networks.nets import BasicUNet

from scripts.engines.exporting import export_model
from scripts.engines.inferers import ClassPromptInferer
from scripts.errors import ConfigError
from scripts.networks.checkpoints import load_weights, save_state_dict
from scripts.networks.model_card import ModelCard
from scripts.networks.prompts import MaskPrediction
from scripts.networks.unet import ClassUNet

CLASSES = (7, 2, 4)  # in their order: 2, 4, 7
FEATURES = (8, 8, 8, 16, 16, 8)


def small(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassUNet(**{"image_size": 32, "class_ids": CLASSES, "features": FEATURES, **settings}).eval()


@pytest.fixture
def images(generator):
    return torch.rand((2, 3, 32, 32), generator=generator)


def test_it_is_monais_unet_with_a_channel_for_each_class_in_order_of_ids(images):
    network = small().requires_grad_(False)
    reference = BasicUNet(spatial_dims=2, in_channels=3, out_channels=3, features=FEATURES).eval()
    reference.load_state_dict(network.plain_unet.state_dict())
    expected = reference(images)
    answer = network(images, torch.tensor([[4, 4, 7], [2, 7, 4]]))
    assert isinstance(answer, MaskPrediction)
    assert torch.equal(answer.logits[0], expected[0, [1, 1, 2]])
    assert torch.equal(answer.logits[1], expected[1, [0, 2, 1]])
    every = network(images)
    assert every.shape == (2, 8, 32, 32)
    assert torch.equal(every[:, [2, 4, 7]], expected)
    assert not every[:, 0].any()
    assert (every[:, [1, 3, 5, 6]] == torch.finfo(every.dtype).min).all()


def test_only_channels_asked_for_learn(images):
    network = small()
    network(images, torch.tensor([[2], [7]])).logits.sum().backward()
    weight = network.plain_unet.final_conv.weight.grad.flatten(1).abs().sum(dim=1)
    assert (weight > 0).tolist() == [True, False, True]


def test_the_inferer_of_class_prompts_asks_it_too(generator):
    """Not square, three slices: as by hand, slice by slice."""
    network = small().requires_grad_(False)
    case = torch.rand((1, 1, 32, 20, 3), generator=generator) * 255
    logits = ClassPromptInferer(class_ids=[2, 7])(case, network)
    assert logits.shape == (1, 2, 32, 20, 3)
    for place in range(3):
        alone = ClassPromptInferer(class_ids=[7])(case[..., place : place + 1], network)
        torch.testing.assert_close(logits[:, 1:, ..., place : place + 1], alone, rtol=1e-2, atol=1e-2)


def test_batched_equals_one_by_one(images):
    network = small().requires_grad_(False)
    together = network(images)
    for place in range(2):
        torch.testing.assert_close(
            together[place : place + 1], network(images[place : place + 1]), rtol=1e-4, atol=1e-5
        )


def test_what_is_saved_is_loaded(images, tmp_path):
    network, other = small().requires_grad_(False), small().requires_grad_(False)
    with torch.no_grad():
        other.plain_unet.final_conv.weight.zero_()
    save_state_dict(network.state_dict(), tmp_path / "model.pt")
    load_weights(other, tmp_path / "model.pt")
    assert torch.equal(network(images), other(images))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_size": 40}, "multiples of 16, not 40"),
        ({"image_size": 16}, "sizes from 32"),
        ({"class_ids": [1, 1]}, "distinct numbers from 1 up"),
        ({"class_ids": []}, "distinct numbers from 1 up"),
        ({"train_image_encoder": False}, "no image encoder to freeze"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        small(**settings)


def test_a_class_without_a_channel_is_refused(images):
    with pytest.raises(ConfigError, match=r"segments the classes \[2, 4, 7\], not \[\[2\], \[3\]\]"):
        small()(images, torch.tensor([[2], [3]]))


def test_what_is_made_for_automedsam_alone_is_refused(images, tmp_path):
    """Exports and ONNX Runtime: in words, not by what the network happens to lack."""
    network = small()
    save_state_dict(network.state_dict(), tmp_path / "model.pt")
    card = ModelCard(network=network.settings, preprocessing={}, trained={}, architecture="unet")
    card.write(tmp_path / "model.json")
    with pytest.raises(ConfigError, match="is a U-Net for comparison, which is not exported"):
        export_model(tmp_path / "model.pt", tmp_path / "out", formats=["safetensors"])
    inferer = ClassPromptInferer(runtime="onnx", checkpoint=str(tmp_path / "model.pt"))
    with pytest.raises(ConfigError, match="ClassUNet has the runtime torch alone, not onnx"):
        inferer(images[:1, :1, ..., None], network)
