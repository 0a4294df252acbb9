"""AutoMedSAM as an app of MONAI Label: segmentation by class, box and point, fine-tuning, and active learning.

It is started with `python -m monailabel.main start_server --app apps/monailabel --studies FOLDER`; docs/monai_label.md
tells the rest.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException

APP = Path(__file__).resolve().parent
BUNDLE = APP.parents[1]
sys.path[:0] = [str(APP), str(BUNDLE)]  # the bundle's code is that of the bundle in which the app lies

from lib.activelearning import MostUncertain, UncertaintyScoring  # noqa: E402
from lib.answers import answer_for_endpoints, answered  # noqa: E402
from lib.infer import InferTask  # noqa: E402
from lib.models import Models  # noqa: E402
from lib.train import FineTuneTask  # noqa: E402
from monailabel.interfaces.app import MONAILabelApp  # noqa: E402
from monailabel.interfaces.datastore import Datastore  # noqa: E402
from monailabel.interfaces.exception import ImageNotFoundException  # noqa: E402
from monailabel.tasks.activelearning.first import First  # noqa: E402
from monailabel.tasks.activelearning.random import Random  # noqa: E402

from scripts.errors import ConfigError  # noqa: E402

NAME = "automedsam"


class AutoMedSAMApp(MONAILabelApp):
    """The bundle behind MONAI Label's server.

    Args:
        app_dir: this folder.
        studies: the images.
        conf: `bundle`, a folder with the `configs/` and `models/` to use in place of the bundle's own.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        bundle = Path(conf.get("bundle", BUNDLE)).absolute()
        if not (bundle / "configs" / "inference.json").is_file():
            raise ConfigError(
                f"{bundle} is no bundle: it has no configs/inference.json; give another with --conf bundle"
            )
        self.models = Models(bundle)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="AutoMedSAM",
            description="classes by name, without manual prompts; research only",
        )

    def init_infers(self) -> dict[str, InferTask]:
        """Offer the one model under each of the types that viewers look for."""
        kinds = {NAME: "vista3d", "segmentation": "segmentation"}
        if self.models.chosen({}).prompted:
            kinds["deepgrow"] = "deepgrow"
        return {name: InferTask(self.models, kind=kind) for name, kind in kinds.items()}

    def init_trainers(self) -> dict[str, FineTuneTask]:
        """Offer fine-tuning."""
        return {NAME: FineTuneTask(self.models, studies=self.studies)}

    def init_strategies(self) -> dict[str, Any]:
        """Offer the least sure image first, and MONAI Label's own ways."""
        return {"uncertainty": MostUncertain(), "first": First(), "random": Random()}

    def init_scoring_methods(self) -> dict[str, UncertaintyScoring]:
        """Offer to score what the model is unsure of."""
        return {"uncertainty": UncertaintyScoring(self._infers[NAME])}

    def on_init_complete(self) -> None:
        """Take over what the server answers when its endpoints refuse a request."""
        from monailabel.app import app

        super().on_init_complete()
        answer_for_endpoints(app)

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment an image, or answer why not."""
        with answered():
            self._require_image(request.get("image"), datastore or self.datastore())
            return super().infer(request, datastore)

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment many images; one that cannot be segmented has the reason in its place, as `error`."""
        # MONAI Label's task deals images out to GPUs by default, and fails where there is none.
        request = {**request, "multi_gpu": bool(torch.cuda.device_count()) and request.get("multi_gpu", True)}
        with answered():
            return self._batch_infer(request, datastore or self.datastore(), _tolerant(super().infer))

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fine-tune, or answer why not."""
        with answered():
            return super().train(request)

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Score the datastore, or answer why not."""
        with answered():
            return super().scoring(request, datastore)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Choose what to label next, or answer why not."""
        with answered():
            return super().next_sample(request)

    @staticmethod
    def _require_image(image: Any, datastore: Datastore) -> None:
        if isinstance(image, str) and not Path(image).exists() and image not in datastore.list_images():
            raise ImageNotFoundException(f"there is no image {image!r} in the datastore")


def _tolerant(infer: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Let a batch go on after an image that cannot be segmented."""

    def segment(request: Mapping[str, Any], *arguments: Any) -> dict[str, Any]:
        try:
            with answered():
                return infer(request, *arguments)
        except HTTPException as error:
            return {"error": error.detail}

    return segment
