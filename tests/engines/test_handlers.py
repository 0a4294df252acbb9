"""The handlers of a training run: what they log, what they stop, what they keep and give back."""

import csv
import json
import logging
import math
import re
import warnings
from types import SimpleNamespace

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.engines.batches import PreparePromptBatch
from scripts.engines.handlers import (
    AnnounceTraining,
    ClipGradients,
    CsvLog,
    EpochTable,
    ExplainOutOfMemory,
    JointLossHandler,
    LoadWeights,
    ResumeFrom,
    SaveBest,
    SaveLast,
    SetEpoch,
    StopOnNaN,
)
from scripts.errors import CheckpointError, ConfigError, OutputError, TrainingError
from scripts.losses.joint import LOSS_NAMES, JointLoss
from scripts.networks.checkpoints import save_state_dict
from scripts.networks.model_card import ModelCard

RATE = 5e-4
DECAY = 0.01


def make_batch(seed, *, images=2, prompts=2, size=32):
    """Questions about random images; the last one is about a class that is not there."""
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand((images, prompts, size, size), generator=generator) > 0.5).float()
    label[-1, -1] = 0
    return {
        "image": torch.rand((images, 3, size, size), generator=generator),
        "label": label,
        "class_id": torch.randint(1, 6, (images, prompts), generator=generator),
        "present": label.bool().flatten(2).any(dim=2),
        "box": torch.rand((images, prompts, 4), generator=generator) * size,
        "distance": label * torch.rand(label.shape, generator=generator),
        "noise_seed": torch.arange(images) + 100 * seed,
    }


@pytest.fixture
def run(build_network, tmp_path):
    """Make trainers of small networks; `known` are parameter groups that the optimizer has from the start."""

    def make(*handlers, batches=(1, 2, 3), epochs=1, loss=None, network=None, log_to=None, with_loss=False, **settings):
        network = build_network() if network is None else network
        loss = JointLoss() if loss is None else loss
        groups = [{"params": [p for p in network.parameters() if p.requires_grad]}]
        if with_loss:
            groups.append({"params": list(loss.parameters()), "weight_decay": 0.0})
        logger = JointLossHandler(loss, output_dir=log_to or tmp_path / "log", tensorboard=False)
        return SupervisedTrainer(
            device="cpu",
            max_epochs=epochs,
            train_data_loader=[make_batch(item) if isinstance(item, int) else item for item in batches],
            network=network,
            optimizer=torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY),
            loss_function=loss,
            prepare_batch=PreparePromptBatch(grid_size=network.grid_size, diffusion_steps=network.diffusion_steps),
            train_handlers=[logger, *handlers],
            decollate=False,
            **settings,
        )

    return make


@pytest.fixture
def second_rank(monkeypatch):
    """Pretend to be a process that writes nothing."""
    monkeypatch.setattr(idist, "get_rank", lambda: 1)


def read_csv(path):
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# CsvLog


def test_a_log_has_one_head_and_a_row_for_each_call(tmp_path):
    log = CsvLog(tmp_path / "deep" / "log.csv", counter="step")
    assert log.rows() == []
    log.start(after=0)
    log.add({"step": 1, "value": 0.5})
    log.add({"step": 2, "value": ""})
    assert (tmp_path / "deep" / "log.csv").read_text().splitlines() == ["step,value", "1,0.5", "2,"]
    assert log.rows() == [{"step": "1", "value": "0.5"}, {"step": "2", "value": ""}]


def test_a_log_goes_on_after_the_point_of_resumption(tmp_path):
    log = CsvLog(tmp_path / "log.csv", counter="step")
    log.start(after=0)
    for step in range(8, 13):
        log.add({"step": step, "value": "old"})
    log = CsvLog(tmp_path / "log.csv", counter="step")
    log.start(after=10)
    log.add({"step": 11, "value": "new"})
    text = (tmp_path / "log.csv").read_text()
    assert text.splitlines() == ["step,value", "8,old", "9,old", "10,old", "11,new"]
    assert list(tmp_path.iterdir()) == [tmp_path / "log.csv"]


def test_a_new_run_begins_a_new_log(tmp_path):
    log = CsvLog(tmp_path / "log.csv", counter="step")
    log.start(after=0)
    log.add({"step": 1, "old": 1})
    log.start(after=0)
    assert log.rows() == []
    log.add({"step": 1, "new": 2})
    assert log.rows() == [{"step": "1", "new": "2"}]


# JointLossHandler


def test_the_loss_weights_learn_without_weight_decay(run):
    loss = JointLoss()
    trainer = run(loss=loss)
    assert len(trainer.optimizer.param_groups) == 1
    trainer.run()
    network_group, loss_group = trainer.optimizer.param_groups
    assert network_group["weight_decay"] == DECAY
    assert loss_group["weight_decay"] == 0
    assert [id(parameter) for parameter in loss_group["params"]] == [id(loss.weights)]
    assert loss_group["lr"] == RATE
    # Adam moves a weight by about the learning rate at each step, whatever its gradient.
    assert ((loss.weights - 1).abs() > 1.5 * RATE).all()


@pytest.mark.parametrize("with_loss", [False, True])
def test_the_loss_weights_join_the_optimizer_only_once(run, with_loss):
    loss = JointLoss()
    trainer = run(loss=loss, with_loss=with_loss)
    for _ in range(2):
        trainer.run()
        held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
        assert held.count(id(loss.weights)) == 1
        assert len(trainer.optimizer.param_groups) == 2


def test_a_trainer_that_runs_again_logs_anew(run, tmp_path):
    trainer = run(batches=[1, 2])
    for _ in range(2):
        trainer.run()
        assert [row["iteration"] for row in read_csv(tmp_path / "log" / "losses.csv")] == [1, 2]


def test_fixed_loss_weights_stay(run):
    loss = JointLoss(weighting="fixed")
    run(loss=loss).run()
    assert loss.weights.tolist() == [1.0] * len(LOSS_NAMES)


def test_every_iteration_is_logged_with_every_part_and_weight(run, tmp_path):
    loss = JointLoss()
    run(loss=loss, epochs=2).run()
    rows = read_csv(tmp_path / "log" / "losses.csv")
    assert [(row["epoch"], row["iteration"]) for row in rows] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    parts = {*LOSS_NAMES, "cross_entropy_present", "cross_entropy_absent"}
    assert set(rows[0]) == {"epoch", "iteration", "loss", *parts, *(f"lambda_{name}" for name in LOSS_NAMES)}
    assert all(row[name] > 0 for row in rows for name in parts)
    # Eq. 17 with the weights before the step, which are 1 at first and then those that the row before says.
    weights = dict.fromkeys(LOSS_NAMES, 1.0)
    for row in rows:
        joint = sum(row[name] / (2 * weight**2) + math.log(1 + weight**2) for name, weight in weights.items())
        assert row["loss"] == pytest.approx(joint, rel=1e-4)
        weights = {name: row[f"lambda_{name}"] for name in LOSS_NAMES}
    assert list(weights.values()) == pytest.approx(loss.weights.tolist())


def test_the_means_of_an_epoch_are_those_of_its_iterations(run, tmp_path):
    metrics = []
    trainer = run(epochs=2)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: metrics.append(dict(engine.state.metrics)))
    trainer.run()
    rows = read_csv(tmp_path / "log" / "losses.csv")
    for epoch, means in enumerate(metrics, start=1):
        for name in ("loss", "dice", "lambda_mse_dense"):
            expected = np.mean([row[name] for row in rows if row["epoch"] == epoch])
            assert means[f"train_{name}"] == pytest.approx(expected)


def test_tensorboard_has_the_same_numbers(run, tmp_path):
    loss = JointLoss()
    trainer = run(JointLossHandler(loss, output_dir=tmp_path / "board"), loss=loss, epochs=2, log_to=tmp_path / "other")
    trainer.run()
    rows = read_csv(tmp_path / "board" / "losses.csv")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    logged = events.Scalars("iteration/lambda_dice")
    assert [event.step for event in logged] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in logged] == pytest.approx([row["lambda_dice"] for row in rows])
    assert [event.step for event in events.Scalars("epoch/train_loss")] == [1, 2]


def test_another_process_learns_but_writes_nothing(run, tmp_path, second_rank):
    trainer = run(EpochTable(tmp_path / "epochs.csv"), SaveLast({}, path=tmp_path / "last.pt"))
    trainer.run()
    assert trainer.state.metrics["train_loss"] > 0
    assert list(tmp_path.iterdir()) == []


# SetEpoch


def test_everything_learns_of_the_epoch_before_its_data_are_drawn(run):
    order = []

    class Target:
        def set_epoch(self, epoch):
            order.append(epoch)

    trainer = run(SetEpoch([Target(), Target()]), batches=[1], epochs=3)
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: order.append("batch"))
    trainer.run()
    assert order == [1, 1, "batch", 2, 2, "batch", 3, 3, "batch"]


# ClipGradients


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_a_gradient_is_bounded_before_the_step(run, build_network, max_norm):
    network, loss, norms = build_network(), JointLoss(), []

    def note():
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        norms.append((torch.cat(gradients).norm().item(), loss.weights.grad.norm().item()))

    trainer = run(ClipGradients(network, max_norm=max_norm), network=network, loss=loss)
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, note)
    trainer.run()
    free = norms[:]
    norms.clear()
    network, loss = build_network(), JointLoss()
    plain = run(network=network, loss=loss)
    plain.add_event_handler(IterationEvents.BACKWARD_COMPLETED, note)
    plain.run()
    assert norms[0][0] > 0.1
    assert free[0][0] == pytest.approx(min(norms[0][0], max_norm), rel=1e-3)
    assert free[0][1] == norms[0][1]  # the loss weights' gradient is not the network's


def test_scaled_gradients_are_brought_back_before_they_are_measured():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 65536.0)
    network, optimizer = torch.nn.ParameterList([weight]), object()

    def unscale(which):
        assert which is optimizer
        weight.grad /= 65536

    engine = SimpleNamespace(scaler=SimpleNamespace(unscale_=unscale), optimizer=optimizer)
    ClipGradients(network, max_norm=2.0)(engine)
    assert weight.grad.item() == 1.0


# StopOnNaN


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(run, build_network, value):
    poisoned = make_batch(2)
    poisoned["distance"][0, 0, 0, 0] = value
    network, loss = build_network(), JointLoss()
    with pytest.raises(
        TrainingError, match=rf"not finite at iteration 2 \(.*shape_distance {value}.*lower the learning"
    ):
        run(StopOnNaN(loss), network=network, loss=loss, batches=[1, poisoned, 3]).run()
    expected, expected_loss = build_network(), JointLoss()
    run(network=expected, loss=expected_loss, batches=[1]).run()
    assert_equal_states(network.state_dict(), expected.state_dict())
    assert torch.equal(loss.weights, expected_loss.weights)


def test_finite_losses_do_not_stop_the_run(run):
    loss = JointLoss()
    trainer = run(StopOnNaN(loss), loss=loss)
    trainer.run()
    assert trainer.state.iteration == 3


# ExplainOutOfMemory


def failing(error, *, at_start=False):
    """An engine that fails, at its first iteration or before it."""

    def fail(*_):
        if isinstance(error, Exception):
            raise error
        error()

    engine = Engine((lambda *_: None) if at_start else fail)
    if at_start:
        engine.add_event_handler(Events.STARTED, fail)
    settings = {"batch_size": 16, "image_size": 96, "image_encoder": "compact"}
    ExplainOutOfMemory(settings).attach(engine)
    return engine


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDNN error: out of memory"),
        MemoryError(),
        lambda: torch.empty(2**55),
        lambda: np.empty(2**55),
    ],
)
@pytest.mark.parametrize("at_start", [False, True])
def test_lack_of_memory_is_told_with_what_to_lower(error, at_start):
    with pytest.raises(
        TrainingError, match=r"^memory ran out; lower one of: batch_size 16, image_size 96, image_encoder compact$"
    ) as caught:
        failing(error, at_start=at_start).run([0])
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes do not fit"), TrainingError("no number")])
def test_every_other_error_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught:
        failing(error).run([0])
    assert caught.value is error


# AnnounceTraining


def said(caplog):
    """What the bundle itself logged; Ignite's engines may be talkative or not."""
    return [record.message for record in caplog.records if record.name.startswith("scripts")]


@pytest.mark.parametrize(
    ("learns", "start", "text"),
    [
        (False, "weights/medsam.pth", r"starting from medsam\.pth; the image encoder is frozen; \d\.\d\d million"),
        (True, "weights/medsam.pth", r"starting from medsam\.pth; the image encoder learns too; \d\.\d\d million"),
        (True, None, r"starting from random weights; the image encoder learns too"),
        (True, "", r"starting from random weights; the image encoder learns too"),
    ],
)
def test_a_run_says_what_learns(build_network, caplog, learns, start, text):
    network = build_network(train_image_encoder=learns)
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    engine = Engine(lambda *_: None)
    AnnounceTraining(network, started_from=start).attach(engine)
    with caplog.at_level(logging.INFO, "scripts"):
        engine.run([0])
    assert pytest.approx(count / 1e6, abs=0.005) == float(said(caplog)[0].split("; ")[-1].split()[0])
    assert re.match(text, said(caplog)[0])


@pytest.mark.parametrize("start", [None, ""])
def test_random_weights_are_not_frozen(build_network, start):
    engine = Engine(lambda *_: pytest.fail("it was trained"))
    AnnounceTraining(build_network(), started_from=start).attach(engine)
    with pytest.raises(ConfigError, match="no weights to freeze: give pretrained a file"):
        engine.run([0])


# LoadWeights


def test_weights_are_loaded_when_the_engine_starts(build_network, tmp_path, caplog):
    source, network = build_network(seed=1), build_network(seed=2)
    save_state_dict(source.state_dict(), tmp_path / "model.pt")
    engine = Engine(lambda *_: assert_equal_states(network.state_dict(), source.state_dict()))
    LoadWeights(network, tmp_path / "model.pt").attach(engine)
    assert not torch.equal(network.mask_decoder.iou_token.weight, source.mask_decoder.iou_token.weight)
    with caplog.at_level(logging.INFO, "scripts"):
        engine.run([0])
    assert said(caplog) == ["loaded weights from model.pt"]


@pytest.mark.parametrize("kind", ["missing", "damaged", "another architecture"])
def test_without_its_weights_an_engine_does_nothing(build_network, tmp_path, kind):
    network, path = build_network(), tmp_path / "model.pt"
    before = copy_of(network)
    if kind == "damaged":
        path.write_bytes(b"not weights")
    if kind == "another architecture":
        save_state_dict(build_network(channels=(8, 8, 8)).state_dict(), path)
    engine = Engine(lambda *_: pytest.fail("it ran"))
    LoadWeights(network, path).attach(engine)
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        engine.run([0])
    assert_equal_states(network.state_dict(), before)


# SaveLast and ResumeFrom


def states_of(trainer):
    return {"network": trainer.network, "loss": trainer.loss_function, "optimizer": trainer.optimizer}


def with_last(trainer, path, handler=SaveLast):
    handler(states_of(trainer), path=path).attach(trainer)
    return trainer


def test_a_resumed_run_has_the_numbers_of_an_unbroken_one(run, tmp_path):
    path = tmp_path / "state" / "last.pt"
    shape = {"batches": (1, 2), "with_loss": True}
    whole = run(epochs=3, log_to=tmp_path / "whole", **shape)
    whole.run()
    with_last(run(**shape), path).run()
    assert list(path.parent.iterdir()) == [path]
    resumed = run(epochs=3, **shape)
    with_last(resumed, path, ResumeFrom)
    with_last(resumed, path)
    resumed.run()
    assert (resumed.state.epoch, resumed.state.iteration) == (3, 6)
    assert_equal_states(resumed.network.state_dict(), whole.network.state_dict())
    assert torch.equal(resumed.loss_function.weights, whole.loss_function.weights)
    assert (tmp_path / "log" / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()
    assert torch.load(path, weights_only=True)["trainer"]["iteration"] == 6


def test_the_loss_weights_of_a_bare_optimizer_are_resumed_too(run, tmp_path):
    first = with_last(run(batches=[1]), tmp_path / "last.pt")
    first.run()
    resumed = with_last(run(batches=[1]), tmp_path / "last.pt", ResumeFrom)
    resumed.run()  # there is nothing left to do
    assert len(resumed.optimizer.param_groups) == 2
    assert torch.equal(resumed.loss_function.weights, first.loss_function.weights)
    assert resumed.state.epoch == 1


def test_what_is_asked_for_now_decides_how_long_a_run_is(run, tmp_path):
    with_last(run(epochs=2, batches=[1]), tmp_path / "last.pt").run()
    resumed = with_last(run(epochs=4, batches=[1]), tmp_path / "last.pt", ResumeFrom)
    resumed.run()
    assert (resumed.state.epoch, resumed.state.max_epochs) == (4, 4)


def test_the_scaler_of_mixed_precision_is_resumed_too(tmp_path):
    def engine_with(scale):
        scaler = SimpleNamespace(scale=scale, state_dict=lambda: {"scale": scale})
        scaler.load_state_dict = lambda state: setattr(scaler, "scale", state["scale"])
        engine = Engine(lambda *_: None)
        engine.state.epoch_length = engine.state.max_epochs = 1
        engine.scaler = scaler
        return engine

    first, second = engine_with(1024.0), engine_with(65536.0)
    SaveLast({}, path=tmp_path / "last.pt")(first)
    ResumeFrom({}, path=tmp_path / "last.pt")(second)
    assert second.scaler.scale == 1024.0


def test_a_run_that_never_was_cannot_be_resumed(run, tmp_path):
    trainer = with_last(run(), tmp_path / "last.pt", ResumeFrom)
    with pytest.raises(
        CheckpointError, match=r"there is no .*last\.pt to resume from; a run writes it after its first"
    ):
        trainer.run()
    assert trainer.state.iteration == 0


@pytest.mark.parametrize("kind", ["weights", "damaged", "cut off", "list", "other network", "without optimizer"])
def test_another_file_cannot_be_resumed(run, build_network, tmp_path, kind):
    path = tmp_path / "last.pt"
    with_last(run(batches=[1]), path).run()
    network = build_network(channels=(8, 8, 8)) if kind == "other network" else None
    trainer = run(network=network, batches=[1], epochs=2)
    if kind == "weights":
        save_state_dict(build_network().state_dict(), path)
    elif kind == "damaged":
        path.write_bytes(b"no zip")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "without optimizer":
        states = torch.load(path, weights_only=True)
        del states["optimizer"]
        torch.save(states, path)
    with_last(trainer, path, ResumeFrom)
    with pytest.raises(CheckpointError, match=r"last\.pt is not the last state of a run with these settings: "):
        trainer.run()
    assert trainer.state.iteration == 0


def test_a_run_over_other_data_cannot_be_resumed(run, build_network, tmp_path):
    with_last(run(batches=[1]), tmp_path / "last.pt").run()
    network = build_network(seed=1)
    before = copy_of(network)
    trainer = with_last(run(network=network, batches=[1, 2], epochs=2), tmp_path / "last.pt", ResumeFrom)
    with pytest.raises(CheckpointError, match=r"a run with 1 iterations an epoch, and this one has 2: resume with the"):
        trainer.run()
    assert_equal_states(network.state_dict(), before)


@pytest.mark.parametrize("where", ["log", "last", "best"])
def test_a_place_that_cannot_be_written_to_is_an_error_of_its_own(run, tmp_path, where):
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "deeper"
    trainer = run(log_to=place if where == "log" else None)
    if where == "last":
        with_last(trainer, place / "last.pt")
    if where == "best":
        trainer.state.metrics["score"] = 1.0
        SaveBest(trainer.network, path=place / "model.pt", metric="score").attach(trainer)
    with pytest.raises(OutputError, match="to be a folder"):
        trainer.run()


# SaveBest


@pytest.fixture
def validate(build_network, tmp_path):
    """Run a stand-in for the evaluator that has reached a score; the network is changed before each."""
    network = build_network()
    card = ModelCard(network=network.settings, preprocessing={}, trained={"CT": ["liver"]}, training={"seed": 3})
    best = SaveBest(network, path=tmp_path / "out" / "model.pt", metric="dsc", write_card=card.write)
    engine = Engine(lambda *_: None)
    best.attach(engine)

    def validate(score):
        with torch.no_grad():
            network.mask_decoder.iou_token.weight += 1
        engine.state.metrics["dsc"] = score
        engine.run([0])
        path = tmp_path / "out" / "model.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

    validate.best, validate.network = best, network
    return validate


def test_the_best_network_is_kept(validate, tmp_path):
    first = validate(0.5)
    assert_equal_states(first, validate.network.state_dict())
    for score in (0.4, 0.5, float("nan"), float("-inf")):
        assert_equal_states(validate(score), first)
    better = validate(np.float64(0.6))
    assert_equal_states(better, validate.network.state_dict())
    card = ModelCard.beside(tmp_path / "out" / "model.pt")
    assert card.training == {"seed": 3, "dsc": 0.6, "epoch": 1}
    assert card.trained == {"CT": ["liver"]}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.pt"]


def test_a_score_that_is_no_number_is_not_the_best(validate):
    assert validate(float("nan")) is None
    assert validate(0.0) is not None


def test_the_best_score_is_part_of_the_state(validate, build_network, tmp_path):
    validate(np.float64(0.5))  # as scores come; a state of NumPy's own types could not be loaded again
    state = validate.best.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other = SaveBest(build_network(), path=tmp_path / "other" / "model.pt", metric="dsc")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for score in (0.4, 0.6):
        other(SimpleNamespace(state=SimpleNamespace(metrics={"dsc": score})))
        assert (tmp_path / "other").exists() == (score > 0.5)


def test_another_process_knows_the_best_score_but_writes_nothing(validate, second_rank):
    assert validate(0.5) is None
    assert validate.best.state_dict() == {"best": 0.5}


def test_where_the_best_network_lies_is_said(validate, caplog):
    with pytest.raises(TrainingError, match="no network was saved: dsc was never a number"):
        validate.best.announce()
    validate(0.25)
    with caplog.at_level(logging.INFO, "scripts"):
        validate.best.announce()
    assert "best network: dsc 0.2500, in " in said(caplog)[-1]
    assert said(caplog)[-1].endswith("model.pt")


# EpochTable


def test_the_table_has_a_row_for_each_epoch_with_scores_where_there_are_any(run, tmp_path):
    evaluator = Engine(lambda *_: None)
    trainer = run(EpochTable(tmp_path / "epochs.csv", evaluator=evaluator), epochs=3)

    # Registered before the run but after the table: so the score of epoch 2 is there from epoch 2 on.
    @trainer.on(Events.ITERATION_COMPLETED(every=6))
    def validate():
        evaluator.state.epoch = 2
        evaluator.state.metrics.update({"val_mean_dsc": 0.5, "val_mean_nsd": 0.25, "val_liver_dsc": 0.75})

    @trainer.on(Events.EPOCH_COMPLETED)
    def schedule():
        trainer.optimizer.param_groups[0]["lr"] /= 2

    trainer.run()
    with open(tmp_path / "epochs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["learning_rate"]) for row in rows] == [RATE, RATE / 2, RATE / 4]
    assert [(row["val_mean_dsc"], row["val_mean_nsd"]) for row in rows] == [("", ""), ("0.5", "0.25"), ("", "")]
    assert float(rows[2]["train_loss"]) == pytest.approx(trainer.state.metrics["train_loss"])
    assert {f"train_{name}" for name in LOSS_NAMES} < set(rows[0])


def test_each_class_has_a_column_from_the_first_score_on(run, tmp_path):
    evaluator = Engine(lambda *_: None)
    trainer = run(EpochTable(tmp_path / "epochs.csv", evaluator=evaluator), epochs=3)

    @trainer.on(Events.ITERATION_COMPLETED(every=3))
    def validate():
        if trainer.state.epoch > 1:
            evaluator.state.epoch = trainer.state.epoch
            evaluator.state.metrics = {"val_mean_dsc": 0.5, "val_liver_dsc": trainer.state.epoch / 4, "other": 1}

    trainer.run()
    rows = CsvLog(tmp_path / "epochs.csv", counter="epoch").rows()
    assert [(row["epoch"], row["val_mean_dsc"], row["val_liver_dsc"]) for row in rows] == [
        ("1", "", ""),
        ("2", "0.5", "0.5"),
        ("3", "0.5", "0.75"),
    ]
    assert all(row["train_loss"] for row in rows)
    assert "other" not in rows[0]


def test_a_resumed_table_goes_on(tmp_path):
    def train(first, last):
        trainer = Engine(lambda *_: None)
        trainer.optimizer = SimpleNamespace(param_groups=[{"lr": first}])
        trainer.state.epoch = first - 1
        EpochTable(tmp_path / "epochs.csv").attach(trainer)
        trainer.add_event_handler(Events.STARTED, lambda engine: None)
        trainer.load_state_dict({"epoch": first - 1, "max_epochs": last, "epoch_length": 1})
        trainer.run([0])
        return [(row["epoch"], row["learning_rate"]) for row in CsvLog(tmp_path / "epochs.csv", counter="epoch").rows()]

    assert train(1, 3) == [("1", "1"), ("2", "1"), ("3", "1")]
    assert train(3, 4) == [("1", "1"), ("2", "1"), ("3", "3"), ("4", "3")]
    assert train(1, 1) == [("1", "1")]


def test_mixed_precision_without_a_gpu_is_no_error(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = with_last(run(amp=True, batches=[1]), tmp_path / "last.pt")
        trainer.run()
    assert json.dumps(torch.load(tmp_path / "last.pt", weights_only=True)["scaler"]) == "{}"
