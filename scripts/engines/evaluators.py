"""MONAI's evaluator, made to outlive a case that cannot be used."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from scripts.errors import AutoMedSAMError, InputError

FAILURE = "failure"
logger = logging.getLogger(__name__)


class TolerantDataset(Dataset):
    """MONAI's dataset, which gives the reason instead of a case that cannot be used."""

    def __getitem__(self, index: int | slice | Sequence[int]) -> Any:
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


class TolerantEvaluator(SupervisedEvaluator):
    """Evaluate case by case; a case that fails is reported at the end and does not stop the others.

    Attributes:
        failures: case name -> reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failures: dict[str, str] = {}
        super().__init__(*args, **kwargs)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Mapping[str, Any]) -> dict:
        """Segment one case, or write down why it cannot be."""
        if FAILURE not in batchdata:
            return super()._iteration(engine, batchdata)
        case, reason = str(batchdata["case"][0]), str(batchdata[FAILURE][0])
        self.failures[case] = reason
        logger.error("%s", reason)
        return {}

    def raise_failures(self) -> None:
        """End with an error that names the cases which failed, where there are any.

        Raises:
            InputError: naming each case and its reason.
        """
        if self.failures:
            reasons = "; ".join(self.failures.values())
            raise InputError(f"{len(self.failures)} of {self.state.epoch_length} cases failed: {reasons}")
