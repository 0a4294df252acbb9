"""What goes from a batch into the network: noise and time steps of the sample's own seed, and which questions."""

import pytest
import torch
from monai.data import MetaTensor
from torch.testing import assert_close

from scripts.data.placing import ImagePrompts
from scripts.engines.batches import (
    PrepareCase,
    PrepareLabelBatch,
    PreparePromptBatch,
    diffusion_noise,
    diffusion_timesteps,
    only_case,
)
from scripts.errors import ConfigError
from scripts.losses.joint import PromptTargets
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.prompts import MaskPrediction

SEEDS = torch.tensor([5, 17, 5])


@pytest.mark.parametrize("prompts", [1, 3])
def test_noise_is_that_of_the_seed_whatever_else_is_in_the_batch(prompts):
    torch.manual_seed(1)
    together = diffusion_noise(SEEDS, prompts=prompts, grid_size=4)
    torch.manual_seed(2)
    assert together.shape == (3, prompts, 256, 4, 4)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    for row, seed in enumerate(SEEDS):
        assert torch.equal(together[row], diffusion_noise(seed.reshape(1), prompts=prompts, grid_size=4)[0])


def test_noise_is_standard_normal_and_its_own_for_every_prompt():
    noise = diffusion_noise(torch.arange(4), prompts=2, grid_size=8)
    # 131 072 values: four standard errors of the mean are 0.011, of the deviation 0.008.
    assert noise.mean().item() == pytest.approx(0, abs=0.011)
    assert noise.std().item() == pytest.approx(1, abs=0.008)
    apart = noise.flatten(0, 1)
    assert len(torch.unique(apart.flatten(1), dim=0)) == 8


def test_noise_of_other_channels():
    assert diffusion_noise(SEEDS, prompts=2, grid_size=3, channels=5).shape == (3, 2, 5, 3, 3)


@pytest.mark.parametrize("steps", [1, 4])
def test_time_steps_are_uniform_from_1_to_the_last(steps):
    drawn = diffusion_timesteps(torch.arange(2000), prompts=2, steps=steps)
    assert drawn.shape == (2000, 2)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn.flatten(), minlength=steps + 1)
    assert counts[0] == 0
    assert len(counts) == steps + 1
    # Four standard deviations of the number of times that one of 4 steps is drawn in 4000.
    assert (counts[1:] - 4000 / steps).abs().max() <= 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_time_steps_are_those_of_the_seed_whatever_else_is_in_the_batch():
    together = diffusion_timesteps(SEEDS, prompts=6, steps=100)
    assert torch.equal(together[0], together[2])
    for row, seed in enumerate(SEEDS):
        assert torch.equal(together[row], diffusion_timesteps(seed.reshape(1), prompts=6, steps=100)[0])
    assert len(set(together[0].tolist())) > 1
    assert not torch.equal(together[0], together[1])


def prompt_batch(generator, images=2, prompts=3, size=32):
    return {
        "image": torch.rand((images, 3, size, size), generator=generator),
        "label": torch.randint(0, 2, (images, prompts, size, size), generator=generator).float(),
        "class_id": torch.randint(1, 6, (images, prompts), generator=generator),
        "present": torch.ones((images, prompts), dtype=torch.bool),
        "box": torch.rand((images, prompts, 4), generator=generator) * size,
        "distance": torch.rand((images, prompts, size, size), generator=generator),
        "noise_seed": torch.arange(images),
    }


def test_a_batch_of_questions_becomes_arguments_and_targets(generator):
    batch = prompt_batch(generator)
    image, targets, positional, arguments = PreparePromptBatch(grid_size=4, diffusion_steps=7)(batch, "cpu")
    assert torch.equal(image, batch["image"])
    assert isinstance(targets, PromptTargets)
    assert torch.equal(targets.mask, batch["label"])
    assert torch.equal(targets.distance, batch["distance"])
    assert torch.equal(targets.present, batch["present"])
    assert positional == ()
    assert sorted(arguments) == ["box", "class_ids", "noise", "timestep"]
    assert torch.equal(arguments["class_ids"], batch["class_id"])
    assert torch.equal(arguments["box"], batch["box"])
    assert torch.equal(arguments["noise"], diffusion_noise(torch.arange(2), prompts=3, grid_size=4))
    assert torch.equal(arguments["timestep"], diffusion_timesteps(torch.arange(2), prompts=3, steps=7))


def test_a_share_of_what_is_there_is_asked_for_by_its_box(generator):
    batch = prompt_batch(generator, images=50, prompts=8)
    batch["present"][:, :2] = False
    _, _, _, arguments = PreparePromptBatch(grid_size=4, diffusion_steps=7, box_share=0.3)(batch)
    by_box = arguments["by_box"]
    assert not by_box[:, :2].any()
    assert 0.22 < by_box[:, 2:].float().mean() < 0.38
    alone = {name: value[7:8] for name, value in batch.items()}
    _, _, _, of_one = PreparePromptBatch(grid_size=4, diffusion_steps=7, box_share=0.3)(alone)
    assert torch.equal(of_one["by_box"], by_box[7:8])


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(ConfigError, match="box_share is a share from 0 to 1"):
        PreparePromptBatch(grid_size=4, diffusion_steps=7, box_share=share)


def test_where_a_box_asks_the_decoder_answers_the_box(build_network, generator):
    """The masks are those of the two kinds of prompts, each asked alone; the prompts to learn stay the class's."""
    network = build_network(class_ids=(1, 2, 3, 4, 5)).eval()
    image, _, _, arguments = PreparePromptBatch(grid_size=4, diffusion_steps=1)(prompt_batch(generator))
    by_box = torch.tensor([[True, False, False], [False, True, True]])
    with torch.no_grad():
        mixed = network(image, **arguments, by_box=by_box)
        by_name = network(image, **arguments)
        of_boxes, _ = network.decode(network.encode_image(image), network.encode_boxes(arguments["box"]))
    assert_close(mixed.logits[by_box], of_boxes[by_box])
    assert_close(mixed.logits[~by_box], by_name.logits[~by_box])
    assert_close(mixed.prompts.sparse, by_name.prompts.sparse)


def test_boxes_are_learned_beside_classes_with_both_branches_alone(build_network, generator):
    network = build_network(prompt_branches="dense")
    image, _, _, arguments = PreparePromptBatch(grid_size=4, diffusion_steps=1, box_share=1.0)(prompt_batch(generator))
    with pytest.raises(ConfigError, match="leave box_share at 0"):
        network(image, **arguments)


@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (2, 3)])
def test_the_network_takes_what_a_batch_becomes(build_network, generator, images, prompts):
    prepare = PreparePromptBatch(grid_size=4, diffusion_steps=1)
    image, targets, positional, arguments = prepare(prompt_batch(generator, images, prompts))
    prediction = build_network()(image, *positional, **arguments)
    assert isinstance(prediction, MaskPrediction)
    assert prediction.logits.shape == targets.mask.shape
    assert len(prediction.teacher.sparse) == images * prompts


def test_everything_is_brought_to_the_device(generator):
    image, targets, _, arguments = PreparePromptBatch(grid_size=4, diffusion_steps=7)(prompt_batch(generator), "meta")
    assert {tensor.device.type for tensor in (image, *targets, *arguments.values())} == {"meta"}
    image, *_ = PreparePromptBatch(grid_size=4, diffusion_steps=7)(prompt_batch(generator), dtype=torch.float16)
    assert image.dtype == torch.float16


def test_without_classes_of_its_own_the_case_is_asked_for_what_it_names(make_case):
    case = make_case()
    del case["label"], case["annotated"]
    case["image"].meta["prompts"] = ImagePrompts((4, 9))
    image, label, positional, arguments = PrepareCase()(case, "cpu")
    assert image.meta["prompts"].class_ids == (4, 9)
    assert torch.equal(image[0].as_tensor(), case["image"].as_tensor())
    assert label is None
    assert positional == ()
    assert arguments == {"case": "a"}


def test_every_annotated_class_is_asked_for_in_every_slice(make_case):
    case = {**make_case(classes=3, annotated=(1, 7)), "modality": "CT"}
    _, label, _, arguments = PrepareCase(class_ids=[7, 1, 3])(case, "cpu")
    assert arguments["modality"] == "CT"
    assert torch.equal(label[0], case["label"].as_tensor())
    assert type(label) is torch.Tensor
    assert arguments["class_ids"] == [1, 3, 7]
    assert arguments["presence"].dtype == torch.bool
    assert arguments["presence"].tolist() == [[[True] * 4, [False] * 4, [True] * 4]]


def test_the_oracle_asks_where_the_truth_has_the_class(make_case):
    case = make_case(classes=3, annotated=(1, 3))  # channel k is there in slices k to 1
    case["label"][2, 5, 5, 3] = 1
    _, _, _, arguments = PrepareCase(class_ids=[1, 2, 3], presence="oracle")(case, "cpu")
    assert arguments["presence"].tolist() == [
        [[True, True, False, False], [False] * 4, [False, False, False, True]],
    ]


def test_the_case_goes_to_the_device(make_case):
    image, label, _, _ = PrepareCase(class_ids=[1, 2])(make_case(), "meta")
    assert (image.device.type, label.device.type) == ("meta", "meta")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ConfigError, match="presence is 'all' or 'oracle', not 'some'"):
        PrepareCase(presence="some")


def test_a_case_is_a_batch_of_one():
    case = {"image": MetaTensor(torch.zeros(1, 2, 2, 2)), "nothing": None}
    assert only_case([case]) is case
    with pytest.raises(ValueError, match="too many values"):
        only_case([case, case])


def test_a_batch_of_labels_goes_to_a_network_without_prompts(generator):
    batch = {"image": torch.rand((2, 3, 32, 32), generator=generator), "label": torch.ones((2, 2, 32, 32))}
    image, masks, positional, arguments = PrepareLabelBatch()(batch)
    assert torch.equal(image, batch["image"])
    assert torch.equal(masks, batch["label"])
    network = HSPSAM(image_encoder="compact", image_size=32, class_ids=[3, 9], train_image_encoder=True)
    assert network(image, *positional, **arguments).shape == masks.shape
    image, masks, *_ = PrepareLabelBatch()(batch, "meta", dtype=torch.float16)
    assert (image.device.type, image.dtype, masks.device.type) == ("meta", torch.float16, "meta")
