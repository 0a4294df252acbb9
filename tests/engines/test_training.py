"""Whole training runs through configs/train.json, at a size that takes a second: the seed alone decides, and a run
that was broken off goes on as if it had not been."""

import csv
import shutil

import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.engines.evaluators import intended_error
from scripts.errors import CheckpointError, ConfigError
from scripts.networks.checkpoints import read_state_dict, save_state_dict
from scripts.networks.model_card import ModelCard

EPOCHS = 3
ITERATIONS = 6  # an epoch: 24 slices in batches of 4


@pytest.fixture(scope="module")
def pretrained(build_network, tmp_path_factory):
    """The weights that all runs start from."""
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    save_state_dict(build_network(seed=5).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def prepare(bundle_root, tiny_phantoms, pretrained):
    """Set up training on phantoms through the shipped config; what is not named here is as shipped."""

    def prepare(output_dir, **overrides):
        workflow = ConfigWorkflow(
            config_file=str(bundle_root / "configs" / "train.json"), logging_file=False, bundle_root=str(bundle_root)
        )
        settings = {
            "datalist": str(tiny_phantoms),
            "dataset_dir": str(tiny_phantoms.parent),
            "output_dir": str(output_dir),
            "pretrained": str(pretrained),
            "image_size": 32,
            "class_code": "scalar",
            "channels": [8, 16, 32],
            "diffusion_steps": 1,
            "max_epochs": EPOCHS,
            "batch_size": 4,
            "classes_per_image": 2,
            "absent_share": 0.5,
            "gradient_clipping": 1.0,
            # A loss that falls counts as bad here: so the learning rate changes in a run as short as this.
            "lr_scheduler#mode": "max",
            "lr_scheduler#patience": 0,
            "tensorboard": False,
            "progress_bar": False,
            "device": "$torch.device('cpu')",
        }
        workflow.parser.update({**settings, **overrides})
        workflow.initialize()
        return workflow

    return prepare


@pytest.fixture(scope="module")
def train(prepare):
    """Train from beginning to end."""

    def train(output_dir, **overrides):
        workflow = prepare(output_dir, **overrides)
        workflow.run()
        workflow.finalize()
        return output_dir

    return train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def first_epoch(train, tmp_path_factory):
    """A run that ended after one epoch."""
    return train(tmp_path_factory.mktemp("first"), max_epochs=1)


@pytest.fixture(scope="module")
def resumed(train, first_epoch, tmp_path_factory):
    """The same run, gone on to the end; what it started from is no longer needed."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(first_epoch, folder, dirs_exist_ok=True)
    return train(folder, resume=str(folder / "last.pt"), pretrained=str(folder / "gone.pt"))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def states(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def assert_identical(first, second, place="last.pt"):
    """Compare nested states bit by bit."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_identical(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_identical(*pair, f"{place}/{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def test_a_run_leaves_what_it_promises(whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        "epochs.csv",
        "last.pt",
        "losses.csv",
        "model.json",
        "model.pt",
    ]
    assert [row["iteration"] for row in rows_of(whole / "losses.csv")] == [
        str(number + 1) for number in range(EPOCHS * ITERATIONS)
    ]
    assert [row["epoch"] for row in rows_of(whole / "epochs.csv")] == ["1", "2", "3"]
    assert set(states(whole)) == {"network", "loss", "optimizer", "lr_scheduler", "best", "trainer"}


def test_the_loss_falls(whole):
    losses = [float(row["train_loss"]) for row in rows_of(whole / "epochs.csv")]
    assert losses[-1] < losses[0]


def test_the_best_network_is_the_one_with_the_best_score(whole, tiny_phantoms):
    scores = [float(row["val_mean_dsc"]) for row in rows_of(whole / "epochs.csv")]
    card = ModelCard.beside(whole / "model.pt")
    assert card.training["val_mean_dsc"] == max(scores) == states(whole)["best"]["best"]
    assert card.training["datalist"] == tiny_phantoms.parent.name
    assert card.trained == {"CT": ["liver", "spleen", "pancreas", "left kidney", "right kidney"]}
    if scores.index(max(scores)) == EPOCHS - 1:
        assert_identical(read_state_dict(whole / "model.pt"), dict(states(whole)["network"]))


def test_a_datalist_may_be_named_without_its_folder(prepare, tiny_phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_phantoms.parent)
    workflow = prepare(tmp_path, datalist=tiny_phantoms.name, dataset_dir=".")
    assert workflow.parser.get_parsed_content("card").training["datalist"] == tiny_phantoms.parent.name


def test_the_same_seed_gives_the_same_losses(whole, first_epoch):
    once = (whole / "losses.csv").read_text().splitlines()
    again = (first_epoch / "losses.csv").read_text().splitlines()
    assert again == once[: 1 + ITERATIONS]


def test_another_seed_gives_other_losses(train, first_epoch, tmp_path):
    other = train(tmp_path, max_epochs=1, seed=1)
    assert rows_of(other / "losses.csv")[0]["dice"] != rows_of(first_epoch / "losses.csv")[0]["dice"]


def test_a_resumed_run_logs_the_same_numbers(whole, resumed):
    for name in ("losses.csv", "epochs.csv", "model.json"):
        assert (resumed / name).read_text() == (whole / name).read_text()


def test_a_resumed_run_ends_in_the_same_state_bit_by_bit(whole, resumed):
    assert_identical(states(resumed), states(whole))
    assert_identical(read_state_dict(resumed / "model.pt"), read_state_dict(whole / "model.pt"))


def test_what_is_resumed_was_worth_resuming(whole, first_epoch):
    """Without this the two tests above would pass over states that never change."""
    before, after = states(first_epoch), states(whole)
    assert after["lr_scheduler"]["_last_lr"][0] < before["lr_scheduler"]["_last_lr"][0] <= 5e-4
    assert not torch.equal(before["loss"]["weights"], after["loss"]["weights"])
    assert after["optimizer"]["state"][0]["step"] == 3 * before["optimizer"]["state"][0]["step"]
    draws = [row["cross_entropy_absent"] for row in rows_of(whole / "losses.csv")]
    assert len(set(draws)) == EPOCHS * ITERATIONS


def test_the_learning_rate_of_a_row_is_the_one_of_its_epoch(whole):
    rates = [float(row["learning_rate"]) for row in rows_of(whole / "epochs.csv")]
    assert rates[0] == 5e-4
    assert rates[-1] < rates[0]
    assert states(whole)["optimizer"]["param_groups"][0]["lr"] < rates[-1]  # the next epoch's


def test_only_what_should_learn_has_learned(whole, pretrained):
    before, after = read_state_dict(pretrained), states(whole)["network"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"class_prompt_encoder", "mask_decoder"}


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_weights_the_image_encoder_learns_too(train, pretrained, tmp_path, nothing):
    words = {"image_encoder": "compact", "train_image_encoder": True, "max_epochs": 1, "val_interval": 1}
    folder = train(tmp_path, pretrained=nothing, **words)
    held = [len(group["params"]) for group in states(folder)["optimizer"]["param_groups"]]
    names = [name for name in read_state_dict(pretrained) if not name.startswith("prompt_encoder.")]
    assert held == [len(names), 1]


def test_the_defaults_are_those_of_the_paper(prepare, tmp_path):
    """Section 4.1.4; weight decay is PyTorch's own, and the loss weights have none."""
    workflow = prepare(tmp_path, **{"lr_scheduler#mode": "min", "lr_scheduler#patience": 5})
    shipped = ConfigWorkflow(config_file=str(workflow.config_root_path / "train.json"), logging_file=False).parser
    assert (shipped["batch_size"], shipped["max_epochs"], shipped["learning_rate"]) == (16, 100, 5e-4)
    assert (shipped["preset"], shipped["train_image_encoder"], shipped["amp"]) == ("paper", False, False)
    assert (shipped["lr_scheduler"]["factor"], shipped["lr_scheduler"].get("mode", "min")) == (0.9, "min")
    assert shipped["lr_scheduler"].get("patience", 10) == 5
    optimizer = workflow.parser.get_parsed_content("optimizer")
    scheduler = workflow.parser.get_parsed_content("lr_scheduler")
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (5e-4, (0.9, 0.999), 1e-8)
    assert type(scheduler) is torch.optim.lr_scheduler.ReduceLROnPlateau
    assert (scheduler.factor, scheduler.patience, scheduler.cooldown, scheduler.mode) == (0.9, 5, 0, "min")


def failure(workflow):
    """The bundle's own error behind what the config machinery makes of it."""
    with pytest.raises(RuntimeError) as caught:
        workflow.run()
    return intended_error(caught.value)


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        ({"pretrained": "nowhere/model.pt"}, CheckpointError, "model.pt"),
        ({"channels": [8, 8, 8]}, CheckpointError, "model.pt"),
        ({"resume": "nowhere/last.pt"}, CheckpointError, "there is no nowhere/last.pt to resume from"),
        ({"pretrained": None}, ConfigError, "no weights to freeze"),
    ],
)
def test_without_the_weights_asked_for_nothing_is_trained(prepare, tmp_path, overrides, kind, words):
    error = failure(prepare(tmp_path, **overrides))
    assert isinstance(error, kind)
    assert words in str(error)
    assert list(tmp_path.iterdir()) == []
