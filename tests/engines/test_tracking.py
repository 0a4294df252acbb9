"""What a run leaves in MLflow, read back by its own client; MONAI's own tracking of the same configs."""

import builtins
import csv
import json
import logging
import os
import sys

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import cli
from scripts.engines.tracking import DATABASE, EXPERIMENT, LONGEST_PARAMETER, LossAsList, TrackRun
from scripts.errors import ConfigError
from scripts.networks.checkpoints import save_state_dict

mlflow = pytest.importorskip("mlflow", reason="MLflow is optional")
pytest.importorskip("sqlalchemy", reason="MLflow's database is optional")


@pytest.fixture(scope="module", autouse=True)
def no_telemetry():
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="module")
def client_of():
    """Open the database of a run's folder."""
    return lambda folder: mlflow.MlflowClient(f"sqlite:///{folder / DATABASE}")


def runs_of(client, name=EXPERIMENT):
    """The runs of an experiment, oldest first."""
    experiment = client.get_experiment_by_name(name)
    return sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time)


def trainer_of(*, epochs=2, fail_at=None, start=0):
    """An engine whose score is a tenth of its epoch."""
    engine = Engine(lambda *_: None)

    @engine.on(Events.EPOCH_COMPLETED)
    def score():
        if engine.state.epoch == fail_at:
            raise RuntimeError("the power went")
        engine.state.metrics = {"train_loss": engine.state.epoch / 10}

    if start:
        engine.load_state_dict({"epoch": start, "max_epochs": epochs, "epoch_length": 1})
    return engine


def history(client, run, name):
    return [(value.step, value.value) for value in client.get_metric_history(run.info.run_id, name)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder in which a run broke off in its second epoch."""
    folder = tmp_path_factory.mktemp("broken")
    engine = trainer_of(epochs=3, fail_at=2)
    TrackRun("mlflow", output_dir=folder, settings={"seed": 0}).attach(engine)
    with pytest.raises(RuntimeError, match="power"):
        engine.run([0], max_epochs=3)
    return folder


def test_a_broken_run_goes_on_when_resumed_and_the_next_one_is_another(broken, client_of):
    def again(**settings):
        engine = trainer_of(**settings)
        tracking = TrackRun("mlflow", output_dir=broken, settings={"seed": 1, "long": "x" * 9999})
        tracking.attach(engine)
        engine.run([0], max_epochs=settings["epochs"])

    again(epochs=3, start=1)
    client = client_of(broken)
    (run,) = runs_of(client)
    assert run.info.status == "FINISHED"
    assert history(client, run, "train_loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert run.data.params["seed"] == "0"  # that of its beginning
    assert run.data.params["long"] == "x" * LONGEST_PARAMETER
    again(epochs=1)
    assert [run.data.params["seed"] for run in runs_of(client)] == ["0", "1"]


def test_a_broken_run_is_marked_when_the_next_one_starts_anew(broken, client_of):
    engine = trainer_of(epochs=3, fail_at=1)
    TrackRun("mlflow", output_dir=broken, settings={}).attach(engine)
    with pytest.raises(RuntimeError, match="power"):
        engine.run([0], max_epochs=2)
    before = runs_of(client_of(broken))
    assert before[-1].info.status == "RUNNING"
    fresh = trainer_of()
    TrackRun("mlflow", output_dir=broken, settings={}).attach(fresh)
    fresh.run([0], max_epochs=1)
    after = {run.info.run_id: run.info.status for run in runs_of(client_of(broken))}
    assert after.pop(before[-1].info.run_id) == "FAILED"
    assert history(client_of(broken), before[-1], "train_loss") == []
    assert len(after) == len(before)
    assert set(after.values()) == {"FINISHED"}


def test_nothing_is_reported_and_no_word_of_the_database(broken, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    engine = trainer_of()
    TrackRun("mlflow", output_dir=broken, settings={}).attach(engine)
    engine.run([0], max_epochs=1)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert sys.modules["mlflow.telemetry"].get_telemetry_client() is None
    assert logging.getLogger("mlflow").level == logging.getLogger("alembic").level == logging.WARNING


def test_another_process_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    engine = trainer_of()
    TrackRun("mlflow", output_dir=tmp_path, settings={}).attach(engine)
    engine.run([0], max_epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="null or 'mlflow', not 'wandb'"):
        TrackRun("wandb", output_dir=tmp_path, settings={})


@pytest.mark.parametrize("package", ["mlflow", "sqlalchemy", "alembic"])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"package {package}.*pip install mlflow-skinny SQLAlchemy alembic"):
        TrackRun("mlflow", output_dir=tmp_path, settings={})


def test_of_an_output_the_loss_stays_as_monai_reads_it():
    engine = Engine(lambda *_: {"loss": torch.tensor(2.5), "pred": torch.zeros(9)})
    LossAsList().attach(engine)
    engine.run([0])
    assert engine.state.output == [{"loss": torch.tensor(2.5)}]


# Whole runs through the shipped configs.


@pytest.fixture(scope="module")
def settings(tiny_phantoms):
    """A training of seconds, from random weights."""
    return {
        "datalist": str(tiny_phantoms),
        "dataset_dir": str(tiny_phantoms.parent),
        "image_size": 32,
        "class_code": "scalar",
        "channels": [8, 16, 32],
        "diffusion_steps": 1,
        "batch_size": 8,
        "pretrained": None,
        "train_image_encoder": True,
        "tensorboard": False,
        "progress_bar": False,
        "max_epochs": 2,
        "class_ids": [1, 4],
        "device": "$torch.device('cpu')",
    }


@pytest.fixture(scope="module")
def run(bundle_root, settings):
    """Run configs with settings over them."""

    def run(*names, tracking=None, **overrides):
        workflow = ConfigWorkflow(
            config_file=[str(bundle_root / "configs" / name) for name in names],
            logging_file=False,
            bundle_root=str(bundle_root),
            tracking=tracking,
            **{**settings, **overrides},
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()

    return run


@pytest.fixture(scope="module")
def track(bundle_root, settings):
    """Run configs with the bundle's own tracking, whose setting has the name of an argument of MONAI's."""

    def track(*names, **overrides):
        workflow = ConfigWorkflow(
            config_file=[str(bundle_root / "configs" / name) for name in names],
            logging_file=False,
            bundle_root=str(bundle_root),
        )
        workflow.parser.update({**settings, "tracking": "mlflow", **overrides})
        workflow.initialize()
        workflow.run()
        workflow.finalize()

    return track


def test_a_training_is_in_mlflow_as_it_is_in_its_table(track, tmp_path, client_of):
    track("train.json", output_dir=str(tmp_path))
    client = client_of(tmp_path)
    (logged,) = runs_of(client)
    with open(tmp_path / "epochs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("epoch", "learning_rate")]
    assert {"train_loss", "val_mean_dsc", "val_mean_nsd", "val_liver_dsc", "val_left_kidney_dsc"} <= set(names)
    for name in names:
        assert history(client, logged, name) == [(int(row["epoch"]), float(row[name])) for row in rows], name
    assert logged.info.status == "FINISHED"
    assert logged.data.params["class_ids"] == "[1, 4]"
    assert {item.path for item in client.list_artifacts(logged.info.run_id)} == {"epochs.csv", "model.json"}


def test_an_evaluation_is_in_mlflow_and_tensorboard_as_it_is_in_its_table(track, tmp_path, client_of, build_network):
    save_state_dict(build_network(seed=5).state_dict(), tmp_path / "model.pt")
    output = tmp_path / "evaluated"
    track(
        "train.json",
        "evaluate.json",
        output_dir=str(output),
        checkpoint=str(tmp_path / "model.pt"),
        class_ids=[1, 2, 3, 4, 5],
        tensorboard=True,
    )
    scores = json.loads((output / "summary.json").read_text())["units"]["mm"]
    expected = {f"val_mean_{name}": scores["mean"][name] for name in ("dsc", "nsd")} | {
        f"val_{organ.replace(' ', '_')}_{name}": entry[name]
        for organ, entry in scores["classes"].items()
        for name in ("dsc", "nsd")
    }
    assert len(expected) == 2 * 6
    client = client_of(output)
    (logged,) = runs_of(client)
    assert logged.data.metrics == expected
    assert logged.data.params["samples"] == "1"
    kept = {item.path for item in client.list_artifacts(logged.info.run_id)}
    assert kept == {"metrics.csv", "summary.json", "run.json"}
    events = EventAccumulator(str(output))
    events.Reload()
    for name, value in expected.items():
        (found,) = events.Scalars(name)
        assert (found.step, found.value) == (1, pytest.approx(value, rel=1e-6))


@pytest.mark.slow
def test_the_command_tracks_training_and_evaluation(tmp_path, client_of, tiny_phantoms):
    """Loss `iou` in training, so that the evaluation predicts its own DSC by the head that learned it."""
    trained, evaluated = tmp_path / "trained", tmp_path / "evaluated"
    words = ["--image_size", "32", "--channels", "[8,16,32]", "--progress_bar", "false", "--tensorboard", "false"]
    losses = "['mse_sparse','mse_dense','dice','cross_entropy','shape_distance','iou']"
    # Hardly trained, a network finds something everywhere; trained briefly, nothing.
    words += ["--learning_rate", "0.00001", "--diffusion_steps", "1"]
    command = ["train", tiny_phantoms, "--from_scratch", "--max_epochs", "1", "--losses", losses, *words]
    cli.main([str(word) for word in (*command, "--tracking", "mlflow", "--output", trained)])
    (logged,) = runs_of(client_of(trained))
    assert {"train_iou", "train_lambda_iou", "val_mean_dsc", "val_mean_nsd"} <= set(logged.data.metrics)
    command = ["evaluate", tiny_phantoms, "--checkpoint", trained / "model.pt", "--progress_bar", "false"]
    cli.main([str(word) for word in (*command, "--tracking", "mlflow", "--output", evaluated)])
    (logged,) = runs_of(client_of(evaluated))
    assert {"val_mean_dsc", "val_mean_nsd"} <= set(logged.data.metrics)
    rows = list(csv.DictReader((evaluated / "quality.csv").open(newline="")))
    drawn = [row for row in rows if int(row["predicted_voxels"])]
    assert drawn, "empty predictions prove nothing"
    assert all(0 <= float(row["predicted_by_head"]) <= 1 for row in drawn)
    pairs = json.loads((evaluated / "calibration.json").read_text())["predicted_by_head"]["pairs"]
    assert pairs == sum(row["dsc"] != "" for row in drawn)


@pytest.mark.slow
def test_monais_own_tracking_follows_training_and_evaluation(run, tmp_path, client_of):
    trained, evaluated = tmp_path / "trained", tmp_path / "evaluated"
    run("train.json", tracking="mlflow", output_dir=str(trained))
    (logged,) = runs_of(client_of(trained), "monai_experiment")
    steps = [step for step, _ in history(client_of(trained), logged, "val_liver_dsc")]
    assert steps == [1, 2]
    assert history(client_of(trained), logged, "train_loss")
    run(
        "train.json",
        "evaluate.json",
        tracking="mlflow",
        output_dir=str(evaluated),
        checkpoint=str(trained / "model.pt"),
    )
    (logged,) = runs_of(client_of(evaluated), "monai_experiment")
    assert logged.info.status == "FINISHED"
    assert {"val_mean_dsc", "val_mean_nsd", "val_liver_dsc", "val_left_kidney_dsc"} <= set(logged.data.metrics)
