"""MONAI's evaluator for whole cases, which outlives one that cannot be used."""

import logging
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents

from scripts.engines.answers import JudgedLogits, SampledLogits
from scripts.engines.processes import gathered
from scripts.errors import AutoMedSAMError, InputError

FAILURE = "failure"
logger = logging.getLogger(__name__)


class TolerantDataset(Dataset):
    """MONAI's dataset, which gives the reason instead of a case that cannot be used."""

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        """Give a prepared case, or `{"case": its name, "failure": why not}`."""
        try:
            return super().__getitem__(index)
        except Exception as error:
            reason = intended_error(error)
            if reason is None:
                raise
            return {"case": self.data[index]["case"], FAILURE: str(reason)}


def intended_error(error: BaseException | None) -> AutoMedSAMError | None:
    """Find the bundle's own error behind one that MONAI wrapped it in; None where there is none."""
    while error is not None and not isinstance(error, AutoMedSAMError):
        error = error.__cause__ or error.__context__
    return error


def _of_one_case(answer: torch.Tensor | SampledLogits | JudgedLogits) -> dict[str, Any]:
    """Take the batch axis off the logits and, of several samples, off their uncertainty."""
    if isinstance(answer, torch.Tensor):
        return {"pred": answer[0]}
    result: dict[str, Any] = {"pred": answer.logits[0]}
    if answer.uncertainty is not None:
        result["uncertainty"] = answer.uncertainty[0]
    return result | ({"quality": answer.quality} if isinstance(answer, JudgedLogits) else {})


class CaseEvaluator(SupervisedEvaluator):
    """Evaluate case by case; a case that fails is reported at the end and does not stop the others.

    A batch is one case, as the transforms left it, without a batch axis: MONAI's collation refuses None, and its
    decollation takes lists apart, both of which a case's entries may be.

    Attributes:
        failures: case name -> reason; after a run, those of all processes together.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failures: dict[str, str] = {}
        super().__init__(*args, **kwargs)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict:
        """Segment one case, or write down why it cannot be."""
        if FAILURE not in batchdata:
            try:
                return super()._iteration(engine, batchdata)
            except Exception as error:  # MONAI wraps what its transforms raise
                reason = intended_error(error)
                if not isinstance(reason, InputError):
                    raise
            # Some is seen at the end alone, such as a DICOM series on whose slices no label map can be laid.
            batchdata = {"case": batchdata["case"], FAILURE: str(reason)}
        self.failures[batchdata["case"]] = batchdata[FAILURE]
        logger.error("%s", batchdata[FAILURE])
        return {}

    def _register_decollate(self) -> None:
        """Hand the case and its output to postprocessing and metrics as lists of one."""

        @self.on(IterationEvents.MODEL_COMPLETED)
        def take_apart(engine: Engine) -> None:
            state: Any = engine.state
            # The prediction alone: the case keeps its own image and label, which know their geometry.
            state.batch, state.output = [state.batch], [_of_one_case(state.output["pred"])]

        # Before the metrics, which could only say that there is nothing to score.
        self.add_event_handler(Events.EPOCH_COMPLETED, self._share_failures)

    def _share_failures(self) -> None:
        """Let every process know what failed in any, and stop where everything did."""
        self.failures = {case: reason for part in gathered(self.failures) for case, reason in part.items()}
        if len(self.failures) == self._case_count():
            self.raise_failures()

    def raise_failures(self) -> None:
        """End with an error that names the cases which failed, where there are any.

        Raises:
            InputError: naming each case and its reason.
        """
        if self.failures:
            cases: dict[str, list[str]] = {}
            for case, reason in self.failures.items():
                cases.setdefault(reason, []).append(case)
            reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in cases.items())
            raise InputError(f"{len(self.failures)} of {self._case_count()} cases failed: {reasons}")

    def _case_count(self) -> int:
        """Count the cases of all processes."""
        return len(cast(Any, self.data_loader).dataset)
