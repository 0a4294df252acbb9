"""Which image to label next: the one that the model is least sure of."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from lib.infer import InferTask
from scripts.engines.evaluators import intended_error
from scripts.engines.postprocessing import LOGIT_OF_HALF, probabilities
from scripts.errors import ConfigError, InputError

SCORE = "uncertainty"  # in the datastore's entry of an image
SCORED_BY = "uncertainty_by"  # there too: the measure, and when the weights were written
MEASURES = ("probability", "noise")
SAMPLES = 4
NOTHING_FOUND = 1.0  # the largest score: either a model misses everything, or there is nothing to label

logger = logging.getLogger(__name__)


def uncertainty(logits: torch.Tensor, spread: torch.Tensor | None = None, *, exclusive: bool = False) -> float:
    """Say how unsure a model is of an image.

    Args:
        logits: `(K, H, W, D)`.
        spread: standard deviation of the probabilities between draws of noise, of the same shape; None for none.
        exclusive: whether the classes exclude one another.

    Returns:
        Mean over all voxels that a class was given, each class by itself: of 1 - |2 p - 1| for a probability p, which
        is 0 where p is 1 and 1 where p is one half; or of twice the spread, 0 to 1 too. 1 where nothing was found.
    """
    total, count = 0.0, 0
    for place, of_class in enumerate(probabilities(logits, exclusive=exclusive)):
        found = logits[place] > LOGIT_OF_HALF
        values = 1 - (2 * torch.as_tensor(of_class) - 1).abs() if spread is None else 2 * spread[place].float()
        total += float(values[found].double().sum())
        count += int(found.sum())
    return total / count if count else NOTHING_FOUND


class UncertaintyScoring(ScoringMethod):
    """Write into the datastore how unsure the model is of each image without a label.

    MONAI Label runs it when the server starts, after each training and after each choice of an image.

    Args:
        task: gives the logits.
    """

    def __init__(self, task: InferTask) -> None:
        super().__init__("how unsure the model is of each image without a label, 0 to 1")
        self.task = task

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score the images.

        Args:
            request: `measure`, "probability" or "noise"; `samples`, draws of noise for the latter; and parameters of an
                inference.
            datastore: whose images are scored.

        Returns:
            `scores` by image, highest first, those that the same weights gave before among them, and `failures`, the
            reasons why others have none.

        Raises:
            ConfigError: an unknown measure, or fewer than two samples.
        """
        measure, samples = request.get("measure", MEASURES[0]), request.get("samples", SAMPLES)
        if measure not in MEASURES:
            raise ConfigError(f"the measure is {' or '.join(MEASURES)}, not {measure!r}")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 2:
            raise ConfigError(f"samples are draws of noise, 2 or more, not {samples!r}")
        key = [measure, self.task.models.chosen(request).stamp]
        scores, failures = {}, {}
        for image in datastore.get_unlabeled_images():
            known = datastore.get_image_info(image)
            if known.get(SCORED_BY) == key:
                scores[image] = known[SCORE]
                continue
            try:
                score = self._score(datastore.get_image_uri(image), request, samples if measure == "noise" else 1)
            except Exception as error:
                reason = intended_error(error)
                if reason is None:
                    raise
                failures[image] = str(reason)
                continue
            scores[image] = score
            datastore.update_image_info(image, {SCORE: score, SCORED_BY: key})
        return {"scores": dict(sorted(scores.items(), key=lambda item: -item[1])), "failures": failures}

    def _score(self, image: str, request: Mapping[str, Any], samples: int) -> float:
        logits, spread = self.task.logits(image, request, samples=samples)
        exclusive = self.task.models.chosen(request).card.architecture == "hsp_sam"
        return uncertainty(logits[0], None if spread is None else spread[0], exclusive=exclusive)


class MostUncertain(Strategy):
    """Give the image without a label of which the model is least sure.

    What was given once comes again only after all others, so that several people do not label the same image.
    """

    def __init__(self) -> None:
        super().__init__("the image of which the model is least sure, by the scores of the method 'uncertainty'")

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose an image; None where all have labels.

        Raises:
            InputError: no image has a score yet.
        """
        images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        if not images:
            return None
        known = {image: datastore.get_image_info(image) for image in images}
        scored = {image: info[SCORE] for image, info in known.items() if SCORE in info}
        if not scored:
            raise InputError(
                "no image has a score yet: wait until the scoring that the server began is done, GET /scoring/ tells, "
                "or run POST /scoring/uncertainty"
            )

        def place(image: str) -> tuple[float, float]:
            given = known[image].get("strategy", {}).get(request["strategy"], {}).get("ts", -math.inf)
            return given, -scored[image]

        chosen = min(scored, key=place)
        logger.info("next: %s, of uncertainty %.3f", chosen, scored[chosen])
        return {"id": chosen, SCORE: scored[chosen]}
