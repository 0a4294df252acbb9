"""The samples of training: what is cut out of a case, what is asked of it, and that nothing but the seed decides."""

import logging
import re

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Lambda, Lambdad, RandAffined, RandGaussianNoised, RandScaleIntensityd

from scripts.data.fitting import network_slices
from scripts.data.slices import (
    LabelledSlices,
    PromptedSlices,
    SlicesToSquared,
    choose_impossible,
    choose_prompts,
    grown_box,
)
from scripts.data.vocabulary import Vocabulary
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


def test_what_the_square_holds_is_written_down():
    label = torch.zeros((2, 10, 24, 3), dtype=torch.uint8)
    label[0, 4, 5, 1] = 1
    label[1, :, :, 1:] = 1
    case = SlicesToSquared(size=SIDE)({"image": torch.rand(1, 10, 24, 3), "label": label})
    assert case["content"] == (7, 16)  # 10 * 16 / 24 is 6.67
    assert case["drawn"].tolist() == [[False, False], [True, True], [False, True]]


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 8, 9, 4), (2, 9, 8, 4)])
def test_a_label_of_other_slices_or_pixels_is_refused(shape):
    case = {"case": "a", "image": torch.rand(1, 8, 8, 4), "label": torch.zeros(shape)}
    with pytest.raises(InputError, match=r"case a: expected a label of \(8, 8, 4\) pixels .*, got \(\d, \d, \d\)"):
        SlicesToSquared(size=SIDE)(case)


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
    return {"case": name, "annotated": list(annotated), "image": image, "label": label, "modality": "MR"}


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


# What cannot be there


def test_impossible_classes_are_drawn_in_their_share():
    impossible = np.array([False, True, False, True])
    rng = np.random.default_rng(0)
    drawn = [choose_impossible(impossible, count=3, share=0.2, rng=rng) for _ in range(2000)]
    # Four standard deviations of a share of 6000 questions.
    assert sum(map(len, drawn)) / 6000 == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / 6000))
    counts = np.bincount(np.concatenate(drawn), minlength=4)
    assert set(np.flatnonzero(counts)) == {1, 3}
    assert counts[1] == pytest.approx(counts[3], rel=0.2)


def test_impossible_classes_are_drawn_once_while_others_are_left():
    drawn = choose_impossible(np.array([True, False, True, True]), count=8, share=1.0, rng=np.random.default_rng(1))
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 2, 3]
    assert len(set(drawn[6:])) == 2


@pytest.mark.parametrize(("impossible", "share"), [([False, False], 0.5), ([True, True], 0.0)])
def test_without_impossible_classes_no_random_number_is_used(impossible, share):
    rng = np.random.default_rng(0)
    drawn = choose_impossible(np.array(impossible), count=4, share=share, rng=rng)
    assert (drawn.dtype.kind, len(drawn)) == ("i", 0)
    assert rng.random() == np.random.default_rng(0).random()


LIVER, LEFT_KIDNEY, RIGHT_KIDNEY, POLYP, TUMOUR = 1, 4, 5, 6, 14


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


def picture(name, *, modality, class_ids, annotated, layers, content=(SIDE, SIDE), **fields):
    """One slice as SlicesToSquared leaves it; layers are the class's rows and columns."""
    label = torch.zeros((1, len(class_ids), SIDE, SIDE), dtype=torch.uint8)
    for class_id, (rows, columns) in layers.items():
        label[0, class_ids.index(class_id), slice(*rows), slice(*columns)] = 1
    image = torch.zeros((1, 1, SIDE, SIDE), dtype=torch.uint8)
    rows, columns = content
    image[0, 0, :rows, :columns] = torch.arange(rows * columns).reshape(content) % 251 + 1
    case = {"case": name, "modality": modality, "annotated": annotated, "image": image, "label": label}
    return case | {"content": content, **fields}


def questions_about(cases, *, draws=200, **settings):
    dataset = PromptedSlices(cases, Compose([]), box_growth=0, **settings)
    found = []
    for epoch in range(draws):
        dataset.set_epoch(epoch)
        found += [dataset[index] for index in range(len(dataset))]
    return found


def test_classes_that_cannot_occur_are_asked_for_and_absent(vocabulary):
    """A polyp in a heart MR, but not what nobody labelled and could be there."""
    ids = [LIVER, LEFT_KIDNEY, POLYP]
    case = picture("heart", modality="MR", class_ids=ids, annotated=[LIVER], layers={LIVER: ((1, 9), (2, 12))})
    settings = {"class_ids": ids, "vocabulary": vocabulary, "absent_share": 0.0, "classes_per_image": 2}
    found = questions_about([case], impossible_share=0.3, draws=500, **settings)
    asked = torch.cat([sample["class_id"] for sample in found])
    assert set(asked.tolist()) == {LIVER, POLYP}
    share = (asked == POLYP).float().mean().item()
    assert share == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 1000))
    for sample in found:
        for position, class_id in enumerate(sample["class_id"].tolist()):
            assert bool(sample["present"][position]) == (class_id == LIVER)
            for name in ("label", "box", "distance"):
                assert bool(sample[name][position].any()) == (class_id == LIVER)


def test_what_a_label_says_of_an_impossible_class_does_not_count(vocabulary):
    ids = [LIVER, POLYP]
    layers = {LIVER: ((1, 9), (2, 12)), POLYP: ((0, 4), (0, 4))}
    case = picture("a", modality="CT", class_ids=ids, annotated=[LIVER], layers=layers)
    found = questions_about([case], class_ids=ids, vocabulary=vocabulary, impossible_share=1.0, draws=3)
    assert all(sample["class_id"].tolist() == [POLYP] and not sample["label"].any() for sample in found)
    dataset = PromptedSlices([case], Compose([]), class_ids=ids)
    assert dataset.present.tolist() == [[True, False]]


def test_what_is_annotated_is_not_impossible(vocabulary):
    ids = [LIVER, POLYP]
    case = picture("a", modality="CT", class_ids=ids, annotated=ids, layers={LIVER: ((1, 9), (2, 12))})
    settings = {"class_ids": ids, "vocabulary": vocabulary, "impossible_share": 1.0, "absent_share": 0.0, "draws": 5}
    assert all(sample["class_id"].tolist() == [LIVER] for sample in questions_about([case], **settings))


@pytest.mark.parametrize(
    ("regions", "asked"), [(["abdomen"], {LIVER, TUMOUR}), (["abdomen", "head"], {LIVER}), (None, {LIVER})]
)
def test_regions_tell_what_cannot_occur(vocabulary, regions, asked):
    ids = [LIVER, TUMOUR]
    case = picture("a", modality="MR", class_ids=ids, annotated=[LIVER], layers={LIVER: ((1, 9), (2, 12))})
    case |= {} if regions is None else {"regions": regions}
    found = questions_about([case], class_ids=ids, vocabulary=vocabulary, impossible_share=0.5, draws=40)
    assert {int(sample["class_id"]) for sample in found} == asked


def test_without_impossible_classes_samples_are_as_without_the_share(vocabulary):
    case = prepared("a")
    with_share = samples(case, vocabulary=vocabulary, impossible_share=0.5, augmentation=random_augmentation())
    without = samples(case, augmentation=random_augmentation())
    # Of 2, 5 and 9 each can occur in MR.
    for index in range(4):
        assert_same(with_share[index], without[index])


def test_the_share_of_impossible_classes_is_a_share(vocabulary):
    with pytest.raises(ConfigError, match=r"impossible_share lies in 0\.\.\.1, not 1\.2"):
        samples(vocabulary=vocabulary, impossible_share=1.2)


@pytest.mark.parametrize("settings", [{"impossible_share": 0.1}, {"orientations": {"MR": "mirror"}}])
def test_what_needs_the_vocabulary_asks_for_it(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} needs? the vocabulary"):
        samples(**settings)


# Mirrors and quarter turns


def two_kidneys(**fields):
    """A slice, wider than high, with the right kidney at the left margin and a larger left kidney on the right."""
    layers = {RIGHT_KIDNEY: ((2, 5), (0, 3)), LEFT_KIDNEY: ((2, 6), (10, 14))}
    settings = {
        "modality": "MR",
        "class_ids": [LIVER, LEFT_KIDNEY, RIGHT_KIDNEY],
        "layers": layers,
        "content": (8, SIDE),
    }
    return picture("kidneys", **{"annotated": [LEFT_KIDNEY, RIGHT_KIDNEY], **settings, **fields})


def test_the_mirrored_right_kidney_is_a_left_one(vocabulary):
    ids = [LIVER, LEFT_KIDNEY, RIGHT_KIDNEY]
    case = two_kidneys()
    found = questions_about(
        [case],
        class_ids=ids,
        vocabulary=vocabulary,
        orientations={"MR": "mirror"},
        classes_per_image=2,
        absent_share=0.0,
        draws=40,
    )
    upright = {LEFT_KIDNEY: [10, 2, 13, 5], RIGHT_KIDNEY: [0, 2, 2, 4]}
    mirrored = {RIGHT_KIDNEY: [2, 2, 5, 5], LEFT_KIDNEY: [13, 2, 15, 4]}
    kinds = set()
    for sample in found:
        is_mirrored = not torch.equal(sample["image"][0], case["image"][0, 0].float() / 255)
        kinds.add(is_mirrored)
        boxes = dict(zip(sample["class_id"].tolist(), sample["box"].tolist(), strict=True))
        assert boxes == (mirrored if is_mirrored else upright)
        assert sample["present"].all()
        image = torch.round(sample["image"][0] * 255)
        expected = case["image"][0, 0, :8].flip(-1) if is_mirrored else case["image"][0, 0, :8]
        assert torch.equal(image[:8], expected.float())
        assert not image[8:].any()
    assert kinds == {False, True}


def test_what_is_annotated_is_mirrored_too(vocabulary):
    """Of one kidney alone the mirror image tells about the other one alone."""
    ids = [LIVER, LEFT_KIDNEY, RIGHT_KIDNEY]
    case = two_kidneys(annotated=[LEFT_KIDNEY])
    settings = {"class_ids": ids, "vocabulary": vocabulary, "orientations": {"mri": "mirror"}, "draws": 40}
    found = questions_about([case], **settings)
    columns = {int(sample["class_id"]): sample["box"][0, ::2].tolist() for sample in found}
    assert columns == {LEFT_KIDNEY: [10, 13], RIGHT_KIDNEY: [2, 5]}
    assert all(sample["present"].all() for sample in found)


def test_what_is_present_is_mirrored_too(vocabulary):
    """A slice with the right kidney alone is, mirrored, one with the left kidney alone."""
    ids = [LIVER, LEFT_KIDNEY, RIGHT_KIDNEY]
    case = two_kidneys(layers={RIGHT_KIDNEY: ((2, 5), (0, 3))})
    settings = {"class_ids": ids, "vocabulary": vocabulary, "orientations": {"MR": "mirror"}, "draws": 40}
    found = questions_about([case], absent_share=0.0, **settings)
    assert {int(sample["class_id"]) for sample in found} == {LEFT_KIDNEY, RIGHT_KIDNEY}
    assert all(sample["present"].all() for sample in found)
    found = questions_about([case], absent_share=1.0, **settings)
    assert {int(sample["class_id"]) for sample in found} == {LEFT_KIDNEY, RIGHT_KIDNEY}
    assert not any(sample["present"].any() for sample in found)


def test_turned_pictures_keep_what_is_where(vocabulary):
    """The mask is the bright part of the picture, whichever way both are laid."""
    case = picture(
        "a",
        modality="endoscopy",
        class_ids=[POLYP],
        annotated=[POLYP],
        layers={POLYP: ((1, 4), (9, 14))},
        content=(6, SIDE),
    )
    case["image"] = (case["label"] * 200 + 20).clone()
    case["image"][..., 6:, :] = 0
    settings = {"class_ids": [POLYP], "vocabulary": vocabulary, "orientations": {"endoscopy": "all"}}
    found = questions_about([case], **settings)
    shapes = set()
    for sample in found:
        bright = torch.round(sample["image"][0] * 255) == 220
        assert torch.equal(sample["label"][0] > 0, bright)
        filled = sample["image"][0] > 0
        shapes.add((int(filled.any(dim=1).sum()), int(filled.any(dim=0).sum())))
        assert filled[0, 0]  # the padding lies at the bottom and on the right
    assert shapes == {(6, 16), (16, 6)}
    assert len({tuple(sample["box"][0].tolist()) for sample in found}) == 8


def test_a_picture_of_padding_stays_one(vocabulary):
    case = picture("a", modality="endoscopy", class_ids=[POLYP], annotated=[POLYP], layers={}, content=(1, SIDE))
    case["image"].zero_()
    settings = {"class_ids": [POLYP], "vocabulary": vocabulary, "orientations": {"endoscopy": "all"}, "draws": 20}
    for sample in questions_about([case], **settings):
        assert not any(sample[name].any() for name in ("image", "label", "present", "box", "distance"))


def test_other_modalities_stay_as_they_are(vocabulary):
    case = prepared("a")
    settings = {"vocabulary": vocabulary, "augmentation": random_augmentation()}
    turned = samples(case, orientations={"endoscopy": "all", "MR": "none", "fundus": "mirror"}, **settings)
    for index in range(4):
        assert_same(turned[index], samples(case, **settings)[index])


def test_augmentation_can_be_switched_off(vocabulary):
    case = two_kidneys()
    settings = {"class_ids": [LIVER, LEFT_KIDNEY, RIGHT_KIDNEY], "vocabulary": vocabulary}
    changes = {"orientations": {"MR": "all"}, "augmentation": random_augmentation()}
    still = questions_about([case], augment=False, draws=20, **settings, **changes)
    for sample in still:
        assert torch.equal(torch.round(sample["image"] * 255), case["image"][0].float().expand(3, -1, -1))
    plain = questions_about([case], draws=20, **settings)
    for first, second in zip(still, plain, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("kind", ["mirror", "all"])
def test_a_kidney_whose_partner_has_no_id_cannot_be_mirrored(vocabulary, kind):
    case = prepared("a", annotated=[RIGHT_KIDNEY])
    settings = {"class_ids": (2, 5, 9), "vocabulary": vocabulary}
    with pytest.raises(ConfigError) as caught:
        PromptedSlices([case], Compose([]), orientations={"MR": kind}, **settings)
    assert str(caught.value) == (
        "a mirrored MR image shows 'left kidney' where 'right kidney' was, but class_ids is [2, 5, 9]: add 4 to "
        "class_ids, or set the orientation of MR to none"
    )
    # Neither kidneys nor lungs show in pictures of mucosa, and upright images need no partner.
    for allowed in ({"endoscopy": kind}, {"MR": "none"}):
        assert len(PromptedSlices([case], Compose([]), orientations=allowed, **settings)) == 4
    assert len(PromptedSlices([case], Compose([]), orientations={"MR": kind}, augment=False, **settings)) == 4


@pytest.mark.parametrize(
    ("orientations", "message"),
    [
        ({"MR": "flip"}, "the orientation of MR is one of none, mirror, all, not 'flip'"),
        ({"MR": True}, "the orientation of MR is one of none, mirror, all, not True"),
        ({"PT": "all"}, "orientations: Modality 'PT' is unknown"),
    ],
)
def test_orientations_that_are_none(vocabulary, orientations, message):
    with pytest.raises(ConfigError, match=message):
        samples(vocabulary=vocabulary, orientations=orientations)


# Nothing is lost without a word


def test_what_is_too_small_for_the_network_is_counted(caplog):
    caplog.set_level(logging.INFO, logger="scripts.data.slices")
    label = torch.zeros((3, 64, 64, 2), dtype=torch.uint8)
    label[0, 16:48, 16:48] = 1  # in both slices
    label[1, 9, 9, 0] = 1  # a pixel between those that are looked at
    label[2, 9, 9, 1] = 1  # another one, of a class that counts as not annotated
    data = {"case": "a", "annotated": [2, 5], "image": torch.rand(1, 64, 64, 2) * 255, "label": label}
    squared = SlicesToSquared(size=SIDE)
    dataset = PromptedSlices([data], Compose([squared]), class_ids=CLASS_IDS, progress=False)
    assert not squared(data)["label"][:, 1:].any()
    assert caplog.messages == ["1 of 3 (slice, class) pairs are too small to be seen at 16 pixels"]
    assert dataset.present.tolist() == [[True, False, False], [True, False, False]]


def test_where_nothing_is_too_small_nothing_is_said(caplog):
    caplog.set_level(logging.INFO, logger="scripts.data.slices")
    label = torch.zeros((3, SIDE, SIDE, 2), dtype=torch.uint8)
    label[1, 9, 9, 0] = 1
    data = {"case": "a", "annotated": [2, 5], "image": torch.rand(1, SIDE, SIDE, 2) * 255, "label": label}
    dataset = PromptedSlices([data], Compose([SlicesToSquared(size=SIDE)]), class_ids=CLASS_IDS, progress=False)
    assert dataset.present.any()
    assert caplog.messages == []


@pytest.mark.parametrize("key", ["image", "label", "drawn"])
def test_a_slice_that_a_transform_loses_is_missed(key):
    lose = Compose([SlicesToSquared(size=SIDE), Lambdad(key, lambda slices: slices[1:])])
    data = {"case": "a", "annotated": [2], "image": torch.rand(1, 8, 8, 4), "label": torch.ones((3, 8, 8, 4))}
    with pytest.raises(InputError, match=r"case a: expected \d slices, got image \d, label \d, label as drawn \d; the"):
        PromptedSlices([data], lose, class_ids=CLASS_IDS, progress=False)


def test_slices_are_as_many_as_were_counted():
    data = {"case": "a", "annotated": [2], "image": torch.rand(1, 8, 8, 4), "label": torch.ones((3, 8, 8, 4))}
    settings = {"transform": Compose([SlicesToSquared(size=SIDE)]), "class_ids": CLASS_IDS, "progress": False}
    counted = data | {"counts": {"slices": 4, "voxels": {}}}
    assert len(PromptedSlices([counted], **settings)) == 4
    with pytest.raises(InputError, match="case a: expected 5 slices, got image 4, label 4, label as drawn 4"):
        PromptedSlices([data | {"counts": {"slices": 5, "voxels": {}}}], **settings)


def test_each_slice_knows_its_data_set():
    cases = [prepared("a", depth=2) | {"set": "x"}, prepared("b", depth=1) | {"set": "y"}]
    assert samples(*cases).sets == ["x", "x", "y"]
    assert samples(prepared("a", depth=2)).sets == ["", ""]


# All classes of a slice


def labelled(*cases, **settings):
    return LabelledSlices(list(cases) or [prepared("a")], Compose([]), class_ids=CLASS_IDS, **settings)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_labelled_sample_is_an_image_and_all_masks(channels):
    case = prepared("a", channels=channels)
    dataset = labelled(case)
    assert len(dataset) == 4
    for place in range(4):
        sample = dataset[place]
        assert sorted(sample) == ["image", "label"]
        assert torch.equal(sample["image"], (case["image"][place].float() / 255).expand(3, -1, -1))
        assert torch.equal(sample["label"], case["label"][place].float())
    assert torch.equal(torch.as_tensor(dataset.present), case["label"].bool().flatten(2).any(dim=2))


def test_labelled_samples_depend_on_seed_epoch_and_index_alone():
    dataset = labelled(augmentation=random_augmentation())
    first = dataset[3]
    dataset.set_epoch(1)
    second = dataset[3]
    assert not torch.equal(first["image"], second["image"])
    dataset.set_epoch(0)
    assert_same(dataset[3], first)
    assert not torch.equal(labelled(augmentation=random_augmentation(), seed=1)[3]["image"], first["image"])


def test_a_mirrored_labelled_image_exchanges_its_partners(vocabulary):
    ids = [LIVER, LEFT_KIDNEY, RIGHT_KIDNEY]
    case = picture(
        "a", modality="MR", class_ids=ids, annotated=ids, layers={LEFT_KIDNEY: ((1, 3), (0, 2))}, content=(6, 8)
    )
    settings = {"class_ids": ids, "vocabulary": vocabulary, "orientations": {"MR": "mirror"}}
    dataset = LabelledSlices([case], Compose([]), **settings)
    seen = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        where = dataset[0]["label"].nonzero().tolist()
        (channel,) = {position[0] for position in where}
        columns = {position[2] for position in where}
        seen.add((ids[channel], *sorted(columns)))
    assert seen == {(LEFT_KIDNEY, 0, 1), (RIGHT_KIDNEY, 6, 7)}


def test_each_case_must_tell_about_all_classes():
    with pytest.raises(InputError, match=r"case half: annotates the classes \[2, 5\], but the network learns"):
        labelled(prepared("a"), prepared("half", annotated=[2, 5]))
