"""A run's scores in MLflow: a database beside the run's other files, and nothing over the network."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from monai.utils import path_to_sqlite_uri

from scripts.data.writing import prepare_output_folder
from scripts.errors import ConfigError

EXPERIMENT = "automedsam"
DATABASE = "mlruns.db"
LONGEST_PARAMETER = 500  # characters of a setting's value that every release of MLflow takes


class TrackRun:
    """Log the metrics of a training or an evaluation to MLflow.

    What `engine.state.metrics` holds after an epoch is logged under the epoch's number: losses and loss weights of a
    training, and of an evaluation the mean DSC and NSD and each class's. MONAI's `MLFlowHandler` does the logging, into
    the SQLite database `mlruns.db` of the run's folder. A run that broke off is marked as failed when the next one
    starts in the same folder, or goes on when that one resumes it.

    Args:
        tracking: `mlflow`, the only kind there is.
        output_dir: folder of the run.
        settings: what was chosen, by name, noted as the run's parameters.
        validator: of a training, the engine whose scores belong to the same run.
        artifacts: files to keep with the run, those that are there at its end.

    Raises:
        ConfigError: another kind, or MLflow or what its database needs is not installed.
    """

    def __init__(
        self,
        tracking: str,
        *,
        output_dir: str | Path,
        settings: Mapping[str, Any],
        validator: Engine | None = None,
        artifacts: Sequence[str | Path] = (),
    ) -> None:
        if tracking != "mlflow":
            raise ConfigError(f"tracking is null or 'mlflow', not '{tracking}'")
        self.folder = Path(output_dir).absolute()
        self.settings = settings
        self.validator = validator
        self.artifacts = artifacts
        self.handler: MLFlowHandler | None = None
        require_mlflow()

    def attach(self, engine: Engine) -> None:
        """Follow the engine; in the first process alone. List it after what changes the metrics or writes artifacts."""
        if idist.get_rank() != 0:
            return
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.log)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        if self.validator is not None:
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.log)

    def start(self, engine: Engine) -> None:
        """Open the database, and a run in it."""
        forbid_telemetry()
        prepare_output_folder(self.folder)
        self.handler = MLFlowHandler(
            tracking_uri=path_to_sqlite_uri(str(self.folder / DATABASE)),
            experiment_name=EXPERIMENT,
            artifacts=[Path(path) for path in self.artifacts],
        )
        self.handler.run_name = name_of_run(self.handler, resumed=engine.state.epoch > 0)
        self.handler.start(engine)
        parameters = {name: str(value)[:LONGEST_PARAMETER] for name, value in self.settings.items()}
        # A parameter cannot change within a run: one that goes on keeps those it had.
        self.handler._delete_exist_param_in_dict(parameters)
        self.handler._log_params(parameters)

    def log(self, engine: Engine) -> None:
        """Log an epoch's metrics; a validation that is no part of a run, such as one for itself, is left alone."""
        if self.handler is not None:
            self.handler.epoch_completed(engine)

    def finish(self, engine: Engine) -> None:
        """Keep the artifacts, mark the run as finished and close the database."""
        if self.handler is not None:
            self.handler.complete()
            self.handler.close()
            self.handler = None


class LossAsList:
    """Leave of an iteration's output the loss alone, in the form of MONAI's decollated outputs: a list of dictionaries.

    MONAI's own `--tracking mlflow` reads the training loss from such a list, and from a dictionary it takes a tuple
    that it cannot log. List it after what looks at the whole output.
    """

    def attach(self, engine: Engine) -> None:
        """Run after each iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Put the list in the output's place."""
        state: Any = engine.state
        state.output = [{"loss": state.output["loss"]}]


def require_mlflow() -> None:
    """Refuse at once what could only fail when the run starts.

    Raises:
        ConfigError: MLflow, or what it needs for its database, is not installed.
    """
    try:
        import alembic  # noqa: F401
        import mlflow  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tracking 'mlflow' needs the package {error.name}, which is not installed: "
            "pip install mlflow-skinny SQLAlchemy alembic, or set tracking to null"
        ) from error


def forbid_telemetry() -> None:
    """Keep MLflow from reporting its use over the network, and from telling how it made its database."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Whether to report is decided at MLflow's import, and MONAI may have imported it before this.
    telemetry = sys.modules.get("mlflow.telemetry")
    if telemetry is not None:
        telemetry.set_telemetry_client()


def name_of_run(handler: MLFlowHandler, *, resumed: bool) -> str:
    """Name the run to log into: that of the one which broke off, where it is resumed, or a new one.

    Without a name MONAI's handler would take up any run that has not finished, one that failed too.

    Args:
        handler: with the database open.
        resumed: whether this run goes on with an earlier one; if not, what broke off is marked as failed.
    """
    experiment = handler.client.get_experiment_by_name(EXPERIMENT)
    runs = handler.client.search_runs([experiment.experiment_id]) if experiment else []  # the latest first
    broken = [run for run in runs if run.info.status == "RUNNING"]
    if broken and resumed:
        return broken[0].info.run_name
    for run in broken:
        handler.client.set_terminated(run.info.run_id, "FAILED")
    return f"run_{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
