"""Two data sets as one model, through configs/train.json: both are drawn, and each is asked about what only the other
can show."""

import json

import numpy as np
import pytest
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from PIL import Image

from scripts.data.datalist import write_datalist
from scripts.engines.evaluators import intended_error
from scripts.errors import ConfigError
from scripts.networks.model_card import ModelCard

POLYP = 6
FRAMES = 12
IMPOSSIBLE = 0.25
CHANGES = {
    "class_ids": [1, 2, 3, 4, 5, POLYP],
    "pretrained": None,
    "train_image_encoder": True,
    "image_size": 32,
    "channels": [8, 16, 32],
    "diffusion_steps": 1,
    "max_epochs": 1,
    "batch_size": 4,
    "classes_per_image": 2,
    "absent_share": 0.2,
    "impossible_share": IMPOSSIBLE,
    "tensorboard": False,
    "progress_bar": False,
    "device": "$torch.device('cpu')",
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """The datalist of an endoscopy set: frames wider than high, with a bright polyp in each."""
    folder = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    entries = []
    for number in range(FRAMES):
        pixels = rng.integers(40, 90, (40, 56, 3), dtype=np.uint8)
        mask = np.zeros((40, 56), dtype=np.uint8)
        top, left = rng.integers(2, 20, size=2)
        mask[top : top + 14, left : left + 18] = 255
        pixels[mask > 0] += 120
        Image.fromarray(pixels).save(folder / f"frame_{number}.png")
        Image.fromarray(mask).save(folder / f"polyp_{number}.png")
        label = {"polyp": f"polyp_{number}.png"}
        entries.append({"case": f"frame_{number}", "image": f"frame_{number}.png", "label": label, "modality": "ES"})
    content = {"name": "frames", "source": {"made": "by hand"}, "training": entries[:-1], "validation": entries[-1:]}
    write_datalist(content, folder / "datalist.json")
    return folder / "datalist.json"


@pytest.fixture(scope="module")
def prepare(bundle_root, tiny_phantoms, frames):
    """Set up training on both sets; the phantoms are what is validated."""

    def prepare(output_dir, **overrides):
        workflow = ConfigWorkflow(
            config_file=str(bundle_root / "configs" / "train.json"), logging_file=False, bundle_root=str(bundle_root)
        )
        settings = {"datalist": [str(tiny_phantoms), str(frames)], "output_dir": str(output_dir), **CHANGES}
        workflow.parser.update({**settings, "validate#cases#path": [str(tiny_phantoms)], **overrides})
        workflow.initialize()
        return workflow

    return prepare


@pytest.fixture(scope="module")
def trained(prepare, tmp_path_factory):
    """A run of one epoch, and the questions of its batches as (class id, whether it is there)."""
    folder = tmp_path_factory.mktemp("trained")
    workflow = prepare(folder)
    asked = []

    def look(engine):
        batch = engine.state.batch
        asked.extend(zip(batch["class_id"].flatten().tolist(), batch["present"].flatten().tolist(), strict=True))

    workflow.parser.get_parsed_content("train#trainer").add_event_handler(Events.ITERATION_COMPLETED, look)
    workflow.run()
    workflow.finalize()
    return folder, asked


def test_an_epoch_goes_over_the_slices_of_both_sets(trained):
    _, asked = trained
    assert len(asked) == 2 * (24 + FRAMES - 1)  # two questions about each slice of two phantoms and each frame
    shown = {class_id for class_id, present in asked if present}
    assert POLYP in shown
    assert shown & {1, 2, 3, 4, 5}
    assert (POLYP, False) in asked  # of a phantom


def test_the_card_names_both_sets_and_what_was_learned_from_each(trained, tiny_phantoms, frames):
    card = ModelCard.beside(trained[0] / "model.pt")
    assert card.training["datalist"] == f"{tiny_phantoms.parent.name}, {frames.parent.name}"
    assert card.trained == {
        "CT": ["liver", "spleen", "pancreas", "left kidney", "right kidney"],
        "endoscopy": ["polyp"],
    }


def test_impossible_classes_are_asked_in_their_share(prepare, tmp_path):
    dataset = prepare(tmp_path).parser.get_parsed_content("train#dataset")
    asked = {"phantoms": [], "frames": []}
    for epoch in range(8):
        dataset.set_epoch(epoch)
        for index, name in enumerate(dataset.sets):
            asked[name] += dataset[index]["class_id"].tolist()
    for name, own in (("phantoms", [1, 2, 3, 4, 5]), ("frames", [POLYP])):
        foreign = ~np.isin(asked[name], own)
        # Four standard deviations of a share.
        deviation = np.sqrt(IMPOSSIBLE * (1 - IMPOSSIBLE) / len(foreign))
        assert foreign.mean() == pytest.approx(IMPOSSIBLE, abs=4 * deviation), name
        assert set(np.array(asked[name])[foreign]) == set(CHANGES["class_ids"]) - set(own)


def test_the_smaller_set_can_be_drawn_as_often_as_the_larger(prepare, tmp_path):
    parser = prepare(tmp_path, set_power=0).parser
    dataset, sampler = (parser.get_parsed_content(f"train#{part}") for part in ("dataset", "sampler"))
    drawn = [dataset.sets[index] for index in sampler]
    assert len(drawn) == 24 + FRAMES - 1
    assert drawn.count("frames") == pytest.approx(len(drawn) / 2, abs=1)


def test_frames_are_turned_and_phantoms_are_not(prepare, tmp_path):
    parser = prepare(tmp_path, **{"train#augmentation": None}).parser
    dataset = parser.get_parsed_content("train#dataset")
    for name, expected in (("phantoms", 1), ("frames", 8)):
        index = dataset.sets.index(name)
        seen = set()
        for epoch in range(60):
            dataset.set_epoch(epoch)
            seen.add(dataset[index]["image"].numpy().tobytes())
        assert len(seen) == expected, name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"set_floor": 0.6}, "set_floor 0.6 cannot hold for 2 data sets"),
        ({"balance": "sets"}, "balance is 'classes' or null"),
        ({"smallest_component": [10]}, "two whole numbers of 0 or more"),
        ({"class_ids": [1, 4, POLYP], "orientations": {"CT": "mirror"}}, "add 5 to class_ids"),
    ],
)
def test_settings_that_cannot_be_met_stop_the_run_before_it_starts(prepare, tmp_path, overrides, words):
    with pytest.raises(RuntimeError) as caught:
        prepare(tmp_path, **overrides).run()
    error = intended_error(caught.value)
    assert isinstance(error, ConfigError)
    assert words in str(error)


def test_small_components_leave_training_labels_and_not_the_truth(prepare, tmp_path):
    """Of the phantoms' organs none is as large as a whole volume."""
    parser = prepare(tmp_path, smallest_component=[10**6, 0], smallest_prediction=[10**6, 0]).parser
    dataset = parser.get_parsed_content("train#dataset")
    phantoms = np.array([name == "phantoms" for name in dataset.sets])
    assert not dataset.present[phantoms].any()
    assert dataset.present[~phantoms].any(axis=1).all()  # in a picture there are pixels only
    assert parser.get_parsed_content("validate#dataset")[0]["label"].any()
    steps = parser.get_parsed_content("validate#postprocessing")
    assert not steps({"pred": np.ones((6, 8, 8, 4), dtype=np.float32)})["pred"].any()


def test_the_datalists_are_settings_like_others(bundle_root):
    """What the other tests change is there to be changed."""
    shipped = json.loads((bundle_root / "configs" / "train.json").read_text(encoding="utf-8"))
    assert set(CHANGES) <= set(shipped)
