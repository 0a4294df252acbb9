"""Classes, boxes and points of one image together: against the network called by hand and the inferer of true boxes."""

import pytest
import torch
from monai.data import MetaTensor

from scripts.data.fitting import network_slices, restore_from_square
from scripts.data.placing import ImagePrompts, PromptedObject, SlicePrompt
from scripts.data.vocabulary import Vocabulary
from scripts.engines.answers import ABSENT_LOGIT, JudgedLogits, SampledLogits, merge_channels
from scripts.engines.batches import tight_boxes
from scripts.engines.box_inferer import BoxPromptInferer
from scripts.engines.inferers import ClassPromptInferer
from scripts.engines.prompt_free_inferer import PromptFreeInferer
from scripts.engines.prompted_inferer import PromptedInferer, canvas_points
from scripts.errors import ConfigError, PromptError

HALF = {"rtol": 1e-3, "atol": 1e-2}
SHAPE = (24, 16, 5)  # (H, W, D), not square


@pytest.fixture
def network(build_network):
    return build_network(class_ids=(1, 2)).eval().requires_grad_(False)


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(3)
    return MetaTensor(torch.rand((1, 1, *SHAPE), generator=generator) * 255)


def box_object(class_id, box, places):
    return PromptedObject(class_id, {place: SlicePrompt(box=box) for place in places})


def by_hand(network, image, place, prompts):
    """Decode one slice's prompts with the network itself: logits (K, H, W)."""
    embedding = network.encode_image(network_slices(image[0].as_tensor(), network.image_size)[place : place + 1])
    squares, _ = network.decode(embedding, prompts)
    return restore_from_square(squares, size=network.image_size, original=SHAPE[:2])[0]


def test_boxes_are_answered_as_those_of_the_truth(network, image):
    masks = torch.zeros((2, *SHAPE), dtype=torch.uint8)
    masks[0, 2:9, 3:7, 1:4] = 1
    masks[1, 5:20, 8:16, 2] = 1
    boxes = tight_boxes(masks)
    expected = BoxPromptInferer()(image, network, class_ids=[1, 2], boxes=boxes.unsqueeze(0))
    objects = [
        PromptedObject(
            class_id,
            {
                place: SlicePrompt(box=tuple(of_class[place].tolist()))
                for place in range(5)
                if masks[k, ..., place].any()
            },
        )
        for k, (class_id, of_class) in enumerate(zip((1, 2), boxes, strict=True))
    ]
    logits = PromptedInferer()(image, network, prompts=ImagePrompts((), tuple(objects)))
    torch.testing.assert_close(logits, expected)
    assert (logits[0, 0, ..., 0] == ABSENT_LOGIT).all()


def test_points_are_answered_as_by_the_network_itself(network, image):
    points, labels = ((3.0, 4.0), (10.0, 20.0)), (1, 0)
    prompts = ImagePrompts((), (PromptedObject(7, {2: SlicePrompt(points=points, labels=labels)}),))
    logits = PromptedInferer()(image, network, prompts=prompts)
    scale = 32 / 24  # the longest side fills the square of 32
    on_square = torch.tensor([[[(x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5] for x, y in points]])
    encoded = network.encode_points(on_square, torch.tensor([labels]))
    torch.testing.assert_close(logits[0, 0, ..., 2].float(), by_hand(network, image, 2, encoded)[0], **HALF)
    assert logits.shape == (1, 1, *SHAPE)
    assert all((logits[0, 0, ..., place] == ABSENT_LOGIT).all() for place in (0, 1, 3, 4))


def test_classes_are_answered_as_without_objects(network, image):
    expected = ClassPromptInferer()(image, network, class_ids=[1, 2])
    objects = (
        box_object(201, (1.0, 1.0, 9.0, 9.0), [0, 3]),
        PromptedObject(4, {1: SlicePrompt(points=((2.0, 2.0),), labels=(1,))}),
    )
    logits = PromptedInferer(prompts_at_once=3)(image, network, prompts=ImagePrompts((1, 2), objects))
    assert logits.shape == (1, 4, *SHAPE)  # 1, 2, 4 and 201
    torch.testing.assert_close(logits[:, :2], expected)


def test_many_objects_are_answered_as_one_by_one(network, image):
    objects = [
        box_object(201, (1.0, 1.0, 9.0, 9.0), range(5)),
        PromptedObject(
            202, {p: SlicePrompt(points=((2.0, 3.0),) * (1 + p % 2), labels=(1,) * (1 + p % 2)) for p in (0, 1, 3, 4)}
        ),
        box_object(203, (0.0, 0.0, 15.0, 23.0), [2]),
    ]
    together = PromptedInferer(prompts_at_once=2)(image, network, prompts=ImagePrompts((), tuple(objects)))
    for channel, item in enumerate(objects):
        alone = PromptedInferer()(image, network, prompts=ImagePrompts((), (item,)))
        torch.testing.assert_close(together[:, channel : channel + 1], alone, **HALF)


def test_objects_of_one_class_share_its_channel(network, image):
    first, second = box_object(1, (1.0, 1.0, 5.0, 5.0), [2]), box_object(1, (8.0, 8.0, 15.0, 20.0), [2])
    parts = [PromptedInferer()(image, network, prompts=ImagePrompts((), (item,))) for item in (first, second)]
    of_class = ClassPromptInferer()(image, network, class_ids=[1])
    together = PromptedInferer()(image, network, prompts=ImagePrompts((1,), (first, second)))
    torch.testing.assert_close(together, torch.stack([*parts, of_class]).amax(dim=0), **HALF)


def test_alike_slices_with_other_boxes_have_other_answers(network):
    same = MetaTensor(torch.full((1, 1, *SHAPE), 100.0))
    same[..., 3:9, 4:9, :] = 200
    item = PromptedObject(5, {0: SlicePrompt(box=(1.0, 1.0, 5.0, 5.0)), 1: SlicePrompt(box=(6.0, 6.0, 15.0, 15.0))})
    logits = PromptedInferer()(same, network, prompts=ImagePrompts((), (item,)))
    assert not torch.equal(logits[..., 0], logits[..., 1])
    assert (logits[..., 2] == ABSENT_LOGIT).all()


def test_prompts_are_found_in_the_metadata_and_survive_a_batch_axis(network, image):
    prompts = ImagePrompts((2,), (box_object(201, (1.0, 1.0, 9.0, 9.0), [1]),))
    carried = image[0]
    carried.meta["prompts"] = prompts
    expected = PromptedInferer()(image, network, prompts=prompts)
    torch.testing.assert_close(PromptedInferer()(carried[None].to("cpu"), network), expected)


def test_classes_in_the_metadata_are_enough(network, image):
    image.meta["prompts"] = ImagePrompts((2,))
    expected = ClassPromptInferer()(image.as_tensor(), network, class_ids=[2])
    for inferer in (PromptedInferer(), ClassPromptInferer()):
        torch.testing.assert_close(inferer(image, network), expected)


def test_without_any_prompt_all_classes_are_asked_for(network, image):
    assert PromptedInferer()(image, network).shape == (1, 2, *SHAPE)


def test_samples_of_a_class_and_a_box(network, image):
    prompts = ImagePrompts((1,), (box_object(1, (1.0, 1.0, 9.0, 9.0), [1]),))
    answer = PromptedInferer(samples=2, noise_seed=0)(image, network, prompts=prompts)
    assert isinstance(answer, SampledLogits)
    assert answer.logits.shape == answer.uncertainty.shape == (1, 1, *SHAPE)
    assert answer.uncertainty.max() > 0


@pytest.mark.parametrize("inferer", [ClassPromptInferer, PromptFreeInferer])
def test_an_inferer_of_classes_refuses_boxes(network, image, inferer):
    image.meta["prompts"] = ImagePrompts((), (box_object(1, (1.0, 1.0, 5.0, 5.0), [2]),))
    with pytest.raises(PromptError, match="asks for classes alone: leave boxes and points out"):
        inferer()(image, network)


def test_boxes_have_the_runtime_torch_alone(network, image):
    prompts = ImagePrompts((), (box_object(1, (1.0, 1.0, 5.0, 5.0), [2]),))
    with pytest.raises(ConfigError, match="boxes and points have the runtime torch alone, not onnx"):
        PromptedInferer(runtime="onnx")(image, network, prompts=prompts)


def test_the_quality_is_of_each_object_by_itself(network, image):
    one, other = box_object(1, (1.0, 1.0, 5.0, 5.0), [2]), box_object(201, (1.0, 1.0, 9.0, 9.0), [1, 2])
    answer = PromptedInferer(quality=True)(image, network, prompts=ImagePrompts((), (other, one)))
    assert isinstance(answer, JudgedLogits)
    assert answer.quality.iou[:, 0].isnan().tolist() == [True, True, False, True, True]  # the channel of class 1
    with pytest.raises(PromptError, match="the quality is known of each object by itself"):
        PromptedInferer(quality=True)(image, network, prompts=ImagePrompts((1,), (one,)))


def test_merged_channels_by_hand():
    logits = torch.tensor([1.0, -2.0, 5.0]).reshape(1, 3, 1, 1, 1)
    spread = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1, 1)
    merged = merge_channels(SampledLogits(logits, spread), [[1], [0, 2]])
    assert merged.logits.flatten().tolist() == [-2.0, 5.0]
    torch.testing.assert_close(merged.uncertainty.flatten(), torch.tensor([0.2, 0.3]))
    assert merge_channels(logits, [[1], [0, 2]]).flatten().tolist() == [-2.0, 5.0]


def test_points_on_the_square_by_hand():
    """A picture of 10 rows and 20 columns fills 16 rows and 32 columns: the corner pixels' centres stay inside."""
    corners = torch.tensor([[0.0, 0.0], [19.0, 9.0], [-0.5, -0.5], [19.5, 9.5]])
    expected = torch.tensor([[0.3, 0.3], [30.7, 14.7], [-0.5, -0.5], [31.5, 15.5]])
    torch.testing.assert_close(canvas_points(corners, original=(10, 20), size=32), expected)


def test_objects_are_answered_whatever_their_quality(network, image):
    """No network expects as much as 1 of its masks, an untrained one least."""
    prompts = ImagePrompts((2,), (box_object(201, (1.0, 1.0, 9.0, 9.0), [0, 3]),))
    whole = PromptedInferer()(image, network, prompts=prompts)
    found = PromptedInferer(smallest_quality=1.0)(image, network, prompts=prompts)
    torch.testing.assert_close(found[:, 1], whole[:, 1])
    assert (whole[:, 0] > ABSENT_LOGIT).all()
    assert (found[:, 0] == ABSENT_LOGIT).all()


def test_true_boxes_are_answered_whatever_their_quality(network, image):
    boxes = torch.tensor([1.0, 1.0, 9.0, 9.0]).expand(1, 1, 5, 4)
    whole, found = (
        BoxPromptInferer(smallest_quality=least)(image, network, class_ids=[1], boxes=boxes) for least in (0.0, 1.0)
    )
    torch.testing.assert_close(found, whole)


def test_objects_are_asked_upright_and_keep_all_their_bodies(bundle_root, network, image):
    """Two lesions of one channel are two; and the classes beside them are averaged, and have one body."""
    boxes = (box_object(201, (0.0, 0.0, 3.0, 3.0), [0]), box_object(201, (14.0, 8.0, 17.0, 11.0), [4]))
    prompts = ImagePrompts((2,), boxes, modality="CT")
    plain = PromptedInferer()(image, network, prompts=prompts)
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    settings = {"averaged_orientations": {"CT": "all"}, "vocabulary": vocabulary, "largest_component": True}
    found = PromptedInferer(**settings)(image, network, prompts=prompts)
    assert torch.equal(found[:, 1], plain[:, 1])
    assert not torch.equal(found[:, 0], plain[:, 0])
    alone = PromptedInferer(**settings)(image, network, class_ids=[2], modality="CT")
    torch.testing.assert_close(found[:, :1], alone)


def test_true_boxes_are_asked_upright_and_keep_all_their_bodies(bundle_root, network, image):
    boxes = torch.tensor([1.0, 1.0, 9.0, 9.0]).expand(1, 1, 5, 4)
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    settings = {"averaged_orientations": {"CT": "all"}, "vocabulary": vocabulary, "largest_component": True}
    whole, found = (
        BoxPromptInferer(**chosen)(image, network, class_ids=[1], boxes=boxes, modality="CT")
        for chosen in ({}, settings)
    )
    assert torch.equal(found, whole)


def test_boxes_alone_are_encoded_upright_alone(bundle_root, network, image):
    vocabulary = Vocabulary.read(bundle_root / "configs" / "classes.yaml")
    inferer = PromptedInferer(averaged_orientations={"CT": "all"}, vocabulary=vocabulary)
    encoded = []
    hook = network.image_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    inferer(image, network, prompts=ImagePrompts((), (box_object(201, (1.0, 1.0, 9.0, 9.0), [0, 3]),), modality="CT"))
    hook.remove()
    assert sum(encoded) == 2
