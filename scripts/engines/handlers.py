"""Ignite handlers of a training run: the joint loss and its weights, what stops a run, and what a run leaves behind."""

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch.utils.tensorboard import SummaryWriter

from scripts.data.writing import prepare_output_folder
from scripts.errors import CheckpointError, ConfigError, TrainingError
from scripts.files import atomic_path
from scripts.losses.dice_cross_entropy import DiceCrossEntropyLoss
from scripts.losses.joint import JointLoss
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import DAMAGE, load_weights, save_state_dict
from scripts.networks.hsp_sam import HSPSAM

logger = logging.getLogger(__name__)
TrainingLoss = JointLoss | DiceCrossEntropyLoss
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory")  # CUDA's and the CPU allocator's own words


class CsvLog:
    """A table that grows by one row at a time and survives a resumed run.

    Args:
        path: the file.
        counter: the column by which rows are ordered; rows after the point of resumption are dropped.
    """

    def __init__(self, path: Path, *, counter: str) -> None:
        self.path = path
        self.counter = counter

    def start(self, after: int) -> None:
        """Keep the rows up to counter `after`, and nothing of an older run where that is 0."""
        prepare_output_folder(self.path.parent)
        kept = [row for row in self.rows() if int(row[self.counter]) <= after]
        self._write(kept, list(kept[0]) if kept else [])

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; the first one also writes the head, which grows where a later one brings new columns."""
        head = self._head()
        new = [name for name in row if name not in head]
        if head and new:
            self._write(self.rows(), [*head, *new])
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*head, *new])
            if not head:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict[str, str]]:
        """Read all rows back."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def _head(self) -> list[str]:
        """Read the names of the columns; none of an empty file or without one."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return next(csv.reader(file), [])

    def _write(self, rows: Sequence[Mapping[str, str]], head: Sequence[str]) -> None:
        """Write all rows anew, and nothing at all where there are no columns."""
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
            if head:
                writer = csv.DictWriter(file, fieldnames=list(head))
                writer.writeheader()
                writer.writerows(rows)


class JointLossHandler:
    """Let the joint loss's weights learn with the network, and log every part of it; or the parts of a loss without.

    The weights become a parameter group of the trainer's optimizer, without weight decay. Each iteration's parts and
    weights go to `losses.csv` and TensorBoard, their epoch means to `engine.state.metrics` under `train_*`. Between
    several processes the weights' gradients are averaged here, since they are no part of the wrapped network.

    Args:
        loss: the trainer's loss function.
        output_dir: folder of `losses.csv`.
        tensorboard: whether to write TensorBoard's event files beside it.
    """

    def __init__(self, loss: TrainingLoss, *, output_dir: str | Path, tensorboard: bool = True) -> None:
        self.loss = loss
        self.log = CsvLog(Path(output_dir) / "losses.csv", counter="iteration")
        self.tensorboard = tensorboard
        self.writer: SummaryWriter | None = None
        self.opened = False
        self.sums: dict[str, float] = {}

    def attach(self, engine: SupervisedTrainer) -> None:
        """Take part in every iteration. List this handler before `ResumeFrom`, which needs the optimizer complete."""
        engine.add_event_handler(Events.STARTED, self.join_optimizer)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.synchronise)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.record)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.summarise)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def join_optimizer(self, engine: SupervisedTrainer) -> None:
        """Let the optimizer learn the weights too, and open the log anew at the first epoch."""
        known = {id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]}
        own = [parameter for parameter in self.loss.parameters() if id(parameter) not in known]
        if own:
            engine.optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        self.opened = False

    def start_epoch(self, engine: Engine) -> None:
        """Begin new means; at the first epoch open the log after the iteration from which the run goes on."""
        self.sums = {}
        if not self.opened and idist.get_rank() == 0:
            self.log.start(after=engine.state.iteration)
            if self.tensorboard:
                self.writer = SummaryWriter(str(self.log.path.parent), purge_step=engine.state.iteration + 1)
        self.opened = True

    def synchronise(self, engine: Engine) -> None:
        """Average the gradients of the weights over the processes."""
        if idist.get_world_size() > 1:
            for parameter in self.loss.parameters():
                if parameter.grad is not None:
                    total = cast(torch.Tensor, idist.all_reduce(parameter.grad))  # in place, or on another device
                    parameter.grad = total / idist.get_world_size()

    def record(self, engine: SupervisedTrainer) -> None:
        """Write down one iteration."""
        values = self._values(engine.state.output["loss"])
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if idist.get_rank() != 0:
            return
        self.log.add({"epoch": engine.state.epoch, "iteration": engine.state.iteration, **values})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"iteration/{name}", value, engine.state.iteration)

    def summarise(self, engine: Engine) -> None:
        """Give the epoch's means to the other handlers."""
        iterations = cast(int, engine.state.epoch_length)
        means = {f"train_{name}": total / iterations for name, total in self.sums.items()}
        engine.state.metrics.update(means)
        if self.writer is not None:
            for name, value in means.items():
                self.writer.add_scalar(f"epoch/{name}", value, engine.state.epoch)

    def close(self, engine: Engine) -> None:
        """Close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()

    def _values(self, loss: torch.Tensor) -> dict[str, float]:
        """Gather the loss, its parts and its weights as averages over the processes."""
        parts = {"loss": loss.detach(), **self.loss.components}
        stacked = torch.stack([value.float().reshape(()) for value in parts.values()])
        if idist.get_world_size() > 1:
            stacked = cast(torch.Tensor, idist.all_reduce(stacked)) / idist.get_world_size()
        values = dict(zip(parts, stacked.tolist(), strict=True))
        return values | {f"lambda_{name}": weight for name, weight in self.loss.named_weights().items()}


class SetEpoch:
    """Tell samplers and data sets which epoch it is, so that a resumed run draws what an unbroken one would have.

    Args:
        targets: objects with `set_epoch`.
    """

    def __init__(self, targets: Sequence[Any]) -> None:
        self.targets = targets

    def attach(self, engine: Engine) -> None:
        """Run at the start of each epoch."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Pass the epoch on."""
        for target in self.targets:
            target.set_epoch(engine.state.epoch)


class ClipGradients:
    """Bound the norm of the network's gradient before each step.

    Args:
        network: whose gradient.
        max_norm: the bound.
    """

    def __init__(self, network: torch.nn.Module, *, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: SupervisedTrainer) -> None:
        """Run between backward pass and step."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Clip."""
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class StopOnNaN:
    """End the run with an error as soon as the loss is not a finite number.

    Args:
        loss: whose parts are named in the error.
    """

    def __init__(self, loss: TrainingLoss) -> None:
        self.loss = loss

    def attach(self, engine: Engine) -> None:
        """Run before the weights could take harm."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Look at the loss.

        Raises:
            TrainingError: naming the iteration and the parts.
        """
        output: Any = engine.state.output
        if bool(torch.isfinite(output["loss"]).all()):
            return
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in self.loss.components.items())
        raise TrainingError(
            f"the loss is not finite at iteration {engine.state.iteration} ({parts}); "
            "lower the learning rate, set gradient_clipping, or switch amp off"
        )


class ExplainOutOfMemory:
    """Say what to lower when memory runs out.

    Args:
        settings: what the run uses, by name: for example batch_size, image_size and image_encoder.
    """

    def __init__(self, settings: Mapping[str, object]) -> None:
        self.settings = settings

    def attach(self, engine: Engine) -> None:
        """Run when the engine fails."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, self)

    def __call__(self, engine: Engine, error: BaseException) -> None:
        """Turn lack of memory into an error that helps; pass anything else on.

        Raises:
            TrainingError: naming the settings to lower.
        """
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS):
            used = ", ".join(f"{name} {value}" for name, value in self.settings.items())
            raise TrainingError(f"memory ran out; lower one of: {used}") from error
        raise error


class AnnounceTraining:
    """Say what learns and what is frozen, and refuse to freeze an image encoder that never learned.

    Args:
        network: an `AutoMedSAM` or `HSPSAM`.
        started_from: the file that the weights come from, if any.
    """

    def __init__(self, network: AutoMedSAM | HSPSAM, *, started_from: str | Path | None) -> None:
        self.network = network
        self.started_from = started_from

    def attach(self, engine: Engine) -> None:
        """Run when the engine starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Look at the parts of the network.

        Raises:
            ConfigError: a frozen image encoder without weights.
        """
        learns = self.network.train_image_encoder
        if not learns and not self.started_from:
            raise ConfigError(
                "the image encoder is frozen, but there are no weights to freeze: give pretrained a file, or let the "
                "encoder learn too (train_image_encoder true; on the command line --from_scratch)"
            )
        count = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
        start = Path(self.started_from).name if self.started_from else "random weights"
        state = "learns too" if learns else "is frozen"
        if not learns and self.network.settings.get("lora_rank"):
            state += f" but for LoRA of rank {self.network.settings['lora_rank']}"
        logger.info("starting from %s; the image encoder %s; %.2f million parameters learn", start, state, count / 1e6)


class LoadWeights:
    """Load weights when the engine starts: never silently none.

    Args:
        network: to load into.
        path: a published SAM, MedSAM, LiteMedSAM or MobileSAM file, or a model of this bundle.
        merge_lora: whether to put an `HSPSAM`'s low-rank updates into its weights, which saves inference their
            products; a network that goes on to learn must keep them apart.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path, *, merge_lora: bool = False) -> None:
        self.network = network
        self.path = path
        self.merge_lora = merge_lora

    def attach(self, engine: Engine) -> None:
        """Run when the engine starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load.

        Raises:
            CheckpointError: the file is missing, unreadable or of another architecture.
        """
        load_weights(self.network, self.path)
        logger.info("loaded weights from %s", Path(self.path).name)
        if self.merge_lora and isinstance(self.network, HSPSAM):
            self.network.merge_lora()


class SaveLast:
    """Keep what a run needs to go on, after every epoch, in one file that is whole at any moment.

    Args:
        objects: name -> object with `state_dict`; the trainer itself and its loss scaler are added.
        path: of the file.
    """

    def __init__(self, objects: Mapping[str, Any], *, path: str | Path) -> None:
        self.objects = objects
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Run after each epoch, behind validation and scheduler."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Save."""
        if idist.get_rank() != 0:
            return
        states = {name: item.state_dict() for name, item in _with_trainer(self.objects, engine).items()}
        prepare_output_folder(self.path.parent)
        content = io.BytesIO()  # torch.save reports a full disk as RuntimeError; writing bytes as OSError
        torch.save(states, content)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(content.getbuffer())


class ResumeFrom:
    """Go on where a run stopped, with the numbers of an uninterrupted one.

    Args:
        objects: as for `SaveLast`.
        path: the file that `SaveLast` wrote.
    """

    def __init__(self, objects: Mapping[str, Any], *, path: str | Path) -> None:
        self.objects = objects
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Run when the engine starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Load.

        Raises:
            CheckpointError: no such file, or one of another run.
        """
        max_epochs = engine.state.max_epochs
        try:
            states = torch.load(self.path, map_location="cpu", weights_only=True)
            self._require_same_length(engine, states["trainer"]["epoch_length"])
            for name, item in _with_trainer(self.objects, engine).items():
                item.load_state_dict(states[name])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"there is no {self.path} to resume from; a run writes it after its first epoch"
            ) from error
        except DAMAGE as error:
            raise CheckpointError(f"{self.path} is not the last state of a run with these settings: {error}") from error
        engine.state.max_epochs = max_epochs  # what was asked for now, not then
        logger.info("resumed after epoch %d from %s", engine.state.epoch, self.path.name)

    def _require_same_length(self, engine: Engine, found: int) -> None:
        """Refuse a run over other data or batches, whose epochs would begin and end in the wrong place."""
        if found != engine.state.epoch_length:
            raise CheckpointError(
                f"{self.path} is of a run with {found} iterations an epoch, and this one has "
                f"{engine.state.epoch_length}: resume with the same datalist, batch_size and number of processes"
            )


def _with_trainer(objects: Mapping[str, Any], engine: SupervisedTrainer) -> dict[str, Any]:
    """Add to what a run keeps what belongs to every run; the scaler is there with AMP only."""
    scaler = {} if engine.scaler is None else {"scaler": engine.scaler}
    return {**objects, **scaler, "trainer": engine}


class SaveBest:
    """Keep the best network of a run as `model.pt`, with the card that says what it is.

    Attach it to the evaluator. It has a state, so that a resumed run does not take a worse network for the best.

    Args:
        network: whose weights are saved.
        path: of the weights; the card lies beside it, with the suffix .json.
        metric: name in `engine.state.metrics`, higher being better.
        write_card: called with the card's path, and the metric's value and epoch.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        path: str | Path,
        metric: str,
        write_card: Callable[[Path, dict[str, float]], None] | None = None,
    ) -> None:
        self.network = network
        self.path = Path(path)
        self.metric = metric
        self.write_card = write_card
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Run after each validation."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save the network where it is better than all before."""
        value = float(engine.state.metrics[self.metric])
        if not value > self.best:  # NaN is not better
            return
        self.best = value
        if idist.get_rank() == 0:
            prepare_output_folder(self.path.parent)
            save_state_dict(self.network.state_dict(), self.path)
            if self.write_card is not None:
                self.write_card(self.path.with_suffix(".json"), {self.metric: value, "epoch": engine.state.epoch})
            logger.info("best so far: %s %.4f, saved as %s", self.metric, value, self.path.name)

    def announce(self) -> None:
        """Say where the best network lies.

        Raises:
            TrainingError: no network was ever saved.
        """
        if self.best == float("-inf"):
            raise TrainingError(
                f"no network was saved: {self.metric} was never a number; is any class of the network in the "
                "validation section, and was val_interval reached?"
            )
        logger.info("best network: %s %.4f, in %s", self.metric, self.best, self.path)

    def state_dict(self) -> dict[str, float]:
        """Give what a checkpoint must remember."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up what a checkpoint remembers."""
        self.best = state["best"]


class EpochTable:
    """Write one row an epoch: its learning rate, training losses and validation scores, means and each class's.

    List it behind validation and before the scheduler, which sets the next epoch's learning rate.

    Args:
        path: the CSV file.
        evaluator: the engine whose scores of this epoch are added.
    """

    def __init__(self, path: str | Path, *, evaluator: Engine | None = None) -> None:
        self.log = CsvLog(Path(path), counter="epoch")
        self.evaluator = evaluator

    def attach(self, engine: SupervisedTrainer) -> None:
        """Run after each epoch."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Open the table after the epoch from which the run goes on."""
        if idist.get_rank() == 0:
            self.log.start(after=engine.state.epoch)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Write down one epoch; scores stay empty where it was not validated."""
        if idist.get_rank() != 0:
            return
        rate = engine.optimizer.param_groups[0]["lr"]
        row: dict[str, Any] = {"epoch": engine.state.epoch, "learning_rate": rate}
        row |= {name: value for name, value in engine.state.metrics.items() if name.startswith("train_")}
        if self.evaluator is not None:
            validated = self.evaluator.state.epoch == engine.state.epoch
            scores = self.evaluator.state.metrics if validated else {}
            row |= {name: scores.get(name, "") for name in ("val_mean_dsc", "val_mean_nsd")}
            row |= {name: value for name, value in scores.items() if name.startswith("val_")}
        self.log.add(row)
