"""The samples of training: what is cut out of a case, what is asked of it, and that nothing but the seed decides."""

import re

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Lambda, Lambdad, RandAffined, RandGaussianNoised, RandScaleIntensityd

from scripts.data.fitting import network_slices
from scripts.data.slices import PromptedSlices, SlicesToSquared, choose_prompts, grown_box
from scripts.errors import ConfigError, InputError
from scripts.losses.shape_distance import distance_map

SIDE = 16
CLASS_IDS = (2, 5, 9)


def test_slices_that_already_fit_keep_their_bytes(generator):
    image = torch.randint(0, 256, (1, SIDE, SIDE, 3), generator=generator).float()
    image[0, 0, 0], image[0, 0, 1] = 0, 255  # each slice reaches both ends, so stretching changes nothing
    label = torch.randint(0, 2, (2, SIDE, SIDE, 3), generator=generator).to(torch.uint8)
    case = SlicesToSquared(size=SIDE)({"image": MetaTensor(image), "label": MetaTensor(label)})
    assert torch.equal(case["image"], image.permute(3, 0, 1, 2).to(torch.uint8))
    assert torch.equal(case["label"], label.permute(3, 0, 1, 2))
    assert all(type(case[name]) is torch.Tensor and case[name].dtype == torch.uint8 for name in ("image", "label"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(10, 24), (40, 12), (SIDE, SIDE), (1, 1)])
def test_slices_are_those_of_the_network_as_bytes(channels, height, width, generator):
    image = torch.rand((channels, height, width, 2), generator=generator) * 255
    label = torch.ones((2, height, width, 2), dtype=torch.uint8)
    case = SlicesToSquared(size=SIDE)({"image": image, "label": label})
    expected = network_slices(image, SIDE)[:, :channels] * 255
    assert case["image"].shape == (2, channels, SIDE, SIDE)
    assert (case["image"].float() - expected).abs().max() <= 0.5
    # The label fills what the image fills: its longest side the square, the other in proportion, at the top and left.
    rows, columns = (round(side * SIDE / max(height, width)) for side in (height, width))
    assert case["label"].shape == (2, 2, SIDE, SIDE)
    assert case["label"][:, :, :rows, :columns].all()
    assert case["label"].sum() == 2 * 2 * rows * columns


def test_the_case_that_came_in_stays_as_it_is():
    data = {"image": torch.rand(1, 4, 4, 1), "label": torch.ones((1, 4, 4, 1)), "case": "a"}
    shape = data["image"].shape
    assert SlicesToSquared(size=SIDE)(data)["case"] == "a"
    assert data["image"].shape == shape


def draw(present, *, count, absent_share=0.5, askable=None, seed=0):
    present = np.array(present, dtype=bool)
    askable = np.ones_like(present) if askable is None else np.array(askable, dtype=bool)
    rng = np.random.default_rng(seed)
    return choose_prompts(present, askable, count=count, absent_share=absent_share, rng=rng)


@pytest.mark.parametrize("absent_share", [0.1, 0.25, 0.5])
def test_the_share_of_absent_classes_is_as_asked(absent_share):
    present = np.array([True, True, False, False, False])
    drawn = np.concatenate([draw(present, count=1, absent_share=absent_share, seed=seed) for seed in range(3000)])
    # Four standard deviations of a share p of 3000 draws.
    assert np.mean(~present[drawn]) == pytest.approx(absent_share, abs=4 * np.sqrt(0.25 / 3000))
    for members in (np.flatnonzero(present), np.flatnonzero(~present)):
        counts = np.bincount(drawn, minlength=5)[members]
        assert counts.min() > 0.75 * counts.mean()  # no class is preferred to another


@pytest.mark.parametrize(("absent_share", "expected"), [(0.0, {0, 1}), (1.0, {2, 3})])
def test_the_extreme_shares_leave_no_choice(absent_share, expected):
    drawn = {int(draw([1, 1, 0, 0], count=1, absent_share=absent_share, seed=seed)[0]) for seed in range(50)}
    assert drawn == expected


@pytest.mark.parametrize(("present", "absent_share"), [([1, 1, 1], 1.0), ([0, 0, 0], 0.0)])
def test_where_there_is_no_choice_the_others_are_asked_for(present, absent_share):
    assert sorted(draw(present, count=3, absent_share=absent_share)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_none_is_drawn_twice_while_others_are_left(seed):
    drawn = draw([1, 0, 1, 0, 0], count=13, absent_share=0.3, seed=seed)
    assert drawn.shape == (13,)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert len(set(drawn[10:])) == 3


def test_only_what_the_annotation_tells_about_is_asked_for():
    askable = [0, 1, 0, 1]
    drawn = {int(i) for seed in range(50) for i in draw([1, 1, 0, 0], count=5, askable=askable, seed=seed)}
    assert drawn == {1, 3}


def rectangle(rows, columns, shape=(12, 20)):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (rectangle((3, 6), (7, 15)), [7, 3, 14, 5]),
        (rectangle((4, 5), (9, 10)), [9, 4, 9, 4]),  # one pixel: both corners lie in it
        (rectangle((0, 12), (0, 20)), [0, 0, 19, 11]),
        (rectangle((2, 4), (1, 3)) | rectangle((9, 10), (17, 18)), [1, 2, 17, 9]),
        (rectangle((0, 0), (0, 0)), [0, 0, 0, 0]),
    ],
)
def test_without_growth_the_box_is_tight_with_its_corners_in_it(mask, expected):
    box = grown_box(mask, growth=0, rng=np.random.default_rng(0))
    assert box.dtype == np.float32
    assert box.tolist() == expected


def test_every_side_grows_by_up_to_the_bound_on_its_own():
    mask, rng = rectangle((20, 30), (40, 60), (64, 80)), np.random.default_rng(0)
    boxes = np.stack([grown_box(mask, growth=3, rng=rng) for _ in range(300)])
    outwards = np.array([40, 20, 59, 29]) - boxes
    outwards[:, 2:] *= -1
    assert all(set(side) == {0, 1, 2, 3} for side in outwards.T.tolist())
    assert len(np.unique(outwards, axis=0)) > 100  # of 256: the sides do not move together


def test_the_box_ends_at_the_border_of_the_picture():
    rng = np.random.default_rng(0)
    boxes = [grown_box(rectangle((1, 11), (2, 19)), growth=5, rng=rng).tolist() for _ in range(200)]
    assert min(boxes) == [0, 0, 18, 10]
    assert [max(side) for side in zip(*boxes, strict=True)] == [2, 1, 19, 11]
    assert [min(side) for side in zip(*boxes, strict=True)] == [0, 0, 18, 10]


def test_an_empty_mask_has_no_box_however_much_it_grows():
    assert not grown_box(np.zeros((8, 8)), growth=5, rng=np.random.default_rng(0)).any()


def prepared(name, *, annotated=CLASS_IDS, depth=4, channels=1, seed=0):
    """A case as SlicesToSquared leaves it: class k is a rectangle in the slices whose number has bit k."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (depth, channels, SIDE, SIDE), generator=generator).to(torch.uint8)
    label = torch.zeros((depth, len(CLASS_IDS), SIDE, SIDE), dtype=torch.uint8)
    for place in range(depth):
        for k in range(len(CLASS_IDS)):
            if place >> k & 1:
                label[place, k, 2 + k : 6 + 2 * k, 4 : 9 + k] = 1
    return {"case": name, "annotated": list(annotated), "image": image, "label": label}


def samples(*cases, **settings):
    return PromptedSlices(list(cases) or [prepared("a")], Compose([]), class_ids=CLASS_IDS, **settings)


def random_augmentation():
    """As in configs/train.json: transforms of space and of intensity, each with a random state of its own."""
    return Compose(
        [
            RandAffined(
                ["image", "label"], prob=0.8, rotate_range=0.3, translate_range=2, mode=["bilinear", "nearest"]
            ),
            RandScaleIntensityd("image", factors=0.2, prob=0.5),
            RandGaussianNoised("image", std=0.03, prob=0.5),
        ]
    )


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_every_slice_of_every_case_is_a_sample():
    cases = [prepared("a", depth=3, seed=1), prepared("b", depth=2, seed=2)]
    dataset = samples(*cases)
    images = [case["image"][place] for case in cases for place in range(len(case["image"]))]
    assert len(dataset) == 5
    for index, image in enumerate(images):
        assert torch.equal(dataset[index]["image"], (image.float() / 255).expand(3, -1, -1))


@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_an_image_and_questions_about_it(prompts, channels):
    case = prepared("a", channels=channels)
    sample = samples(case, classes_per_image=prompts, box_growth=0)[3]
    assert sample["image"].shape == (3, SIDE, SIDE)
    assert torch.equal((sample["image"] * 255).round().to(torch.uint8), case["image"][3].expand(3, -1, -1))
    assert {name: tuple(value.shape) for name, value in sample.items() if name != "image"} == {
        "label": (prompts, SIDE, SIDE),
        "class_id": (prompts,),
        "present": (prompts,),
        "box": (prompts, 4),
        "distance": (prompts, SIDE, SIDE),
        "noise_seed": (),
    }
    assert (sample["present"].dtype, sample["label"].dtype) == (torch.bool, torch.float32)
    for position, class_id in enumerate(sample["class_id"].tolist()):
        mask = case["label"][3, CLASS_IDS.index(class_id)].numpy()
        assert np.array_equal(sample["label"][position], mask)
        assert bool(sample["present"][position]) == mask.any()
        assert sample["box"][position].tolist() == grown_box(mask, growth=0, rng=np.random.default_rng()).tolist()


@pytest.mark.parametrize("form", ["soft", "max_normalised", "raw"])
def test_distance_maps_are_those_of_the_masks(form):
    dataset = samples(classes_per_image=3, distance_form=form)
    for index in range(len(dataset)):
        sample = dataset[index]
        expected = np.stack([distance_map(mask, form=form) for mask in sample["label"].numpy()])
        assert np.array_equal(sample["distance"], expected)
    assert sample["distance"].any()


def test_an_item_does_not_depend_on_what_was_asked_before():
    settings = {"classes_per_image": 2, "augmentation": random_augmentation(), "seed": 3}
    forwards, backwards = (samples(**settings) for _ in range(2))
    first = [forwards[index] for index in range(4)]
    second = [backwards[index] for index in (3, 1, 2, 0)]
    np.random.seed(0)  # neither does it depend on global random numbers
    torch.manual_seed(0)
    for index, sample in zip((3, 1, 2, 0), second, strict=True):
        assert_same(first[index], sample)
        assert_same(first[index], forwards[index])


def test_an_item_does_not_depend_on_the_number_of_workers():
    epochs = []
    for workers in (0, 2):
        dataset = samples(prepared("a"), prepared("b", depth=2), augmentation=random_augmentation())
        loader = DataLoader(dataset, batch_size=2, num_workers=workers)
        batches = []
        for epoch in (1, 2):
            dataset.set_epoch(epoch)
            batches += list(loader)
        epochs.append(batches)
    for alone, together in zip(*epochs, strict=True):
        assert_same(alone, together)
    assert not torch.equal(epochs[0][0]["noise_seed"], epochs[0][3]["noise_seed"])


@pytest.mark.parametrize("what", ["epoch", "seed", "index"])
def test_another_epoch_seed_or_index_asks_and_augments_anew(what):
    case = prepared("a", depth=20)
    case["image"][:], case["label"][:] = case["image"][3], case["label"][3]
    dataset = samples(case, augmentation=random_augmentation())
    other = samples(case, augmentation=random_augmentation(), seed=1) if what == "seed" else dataset
    first = [dataset[index] for index in range(10)]
    if what == "epoch":
        dataset.set_epoch(1)
    second = [other[index + 10 if what == "index" else index] for index in range(10)]
    for name in ("image", "class_id", "box", "noise_seed"):
        assert not torch.equal(torch.stack([s[name] for s in first]), torch.stack([s[name] for s in second])), name
    if what == "epoch":
        dataset.set_epoch(0)
        assert_same(first[4], dataset[4])


def test_samples_are_alike_in_no_two_places():
    seeds = [int(samples(prepared("a", depth=30))[index]["noise_seed"]) for index in range(30)]
    assert len(set(seeds)) == 30


def test_what_augmentation_pushes_out_of_the_picture_is_absent():
    erase = Compose([Lambdad("label", torch.zeros_like)])
    sample = samples(classes_per_image=3, augmentation=erase)[3]
    assert not any(sample[name].any() for name in ("present", "label", "box", "distance"))


def test_box_and_distance_follow_the_augmented_mask():
    move = Compose([Lambdad(["image", "label"], lambda layers: torch.roll(layers, 5, dims=-1))])
    plain, moved = (samples(box_growth=0, absent_share=0, augmentation=step)[3] for step in (None, move))
    assert torch.equal(moved["box"], plain["box"] + torch.tensor([5, 0, 5, 0]))
    assert torch.equal(moved["distance"], torch.roll(plain["distance"], 5, dims=-1))
    assert torch.equal(moved["image"], torch.roll(plain["image"], 5, dims=-1))


def test_augmented_images_stay_within_the_range_of_the_network():
    brighten = Compose([Lambdad("image", lambda image: MetaTensor(image * 3 - 1))])
    image = samples(augmentation=brighten)[0]["image"]
    assert type(image) is torch.Tensor
    assert (image.min(), image.max()) == (0, 1)


def test_classes_that_were_not_annotated_are_never_asked_for():
    partial = samples(prepared("a", annotated=[5]), prepared("b", annotated=[2, 9, 77]), classes_per_image=2)
    asked = {"a": set(), "b": set()}
    for epoch in range(20):
        partial.set_epoch(epoch)
        for index in range(len(partial)):
            asked["a" if index < 4 else "b"] |= set(partial[index]["class_id"].tolist())
    assert asked == {"a": {5}, "b": {2, 9}}


@pytest.mark.parametrize("absent_share", [0.0, 1.0])
def test_the_share_of_absent_questions_is_a_setting(absent_share):
    dataset = samples(absent_share=absent_share)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        assert [bool(dataset[index]["present"].any()) for index in (1, 2, 3)] == [absent_share == 0] * 3


def test_ids_belong_to_channels_in_ascending_order():
    case = prepared("a")
    dataset = PromptedSlices([case], Compose([]), class_ids=(9, 2, 5), absent_share=0.0)
    assert dataset[1]["class_id"].tolist() == [2]  # slice 1 has the first channel alone
    assert dataset[2]["class_id"].tolist() == [5]


@pytest.mark.parametrize("settings", [{"absent_share": 1.5}, {"absent_share": -0.1}, {"classes_per_image": 0}])
def test_settings_that_cannot_be_met_are_refused(settings):
    with pytest.raises(ConfigError, match=r"absent_share lies in 0\.\.\.1 and classes_per_image is at least 1"):
        samples(**settings)


@pytest.mark.parametrize("annotated", [[], [1, 3]])
def test_a_case_without_any_of_the_classes_is_refused_before_files_are_read(annotated):
    def read(case):
        pytest.fail("a file was read")

    with pytest.raises(InputError, match=rf"case lonely: .*{re.escape(str(annotated))}.*\[2, 5, 9\]"):
        PromptedSlices([{"case": "lonely", "annotated": annotated}], Compose([Lambda(read)]), class_ids=CLASS_IDS)


def test_no_slice_is_no_training():
    with pytest.raises(InputError, match="no slice to learn from"):
        PromptedSlices([], Compose([]), class_ids=CLASS_IDS)
