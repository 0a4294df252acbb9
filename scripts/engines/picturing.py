"""Pictures of every case's errors, written while an evaluation has the images at hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.utils import convert_to_numpy

from scripts.data.vocabulary import Vocabulary
from scripts.data.writing import prepare_output_folder
from scripts.report.error_pictures import PICTURES_FOLDER, error_picture, picture_name


class SaveErrorPictures:
    """Write `pictures/<case>__<class>.png` for each class that the truth of a case shows.

    A report takes its worst, median and best cases from them, and needs no data then. Pictures of an earlier evaluation
    in the same folder go when this one starts.

    Args:
        class_ids: of the channels of `pred` and `label`, ascending.
        vocabulary: their names.
        output_dir: folder of the evaluation.
    """

    def __init__(self, *, class_ids: Sequence[int], vocabulary: Vocabulary, output_dir: str | Path) -> None:
        self.class_ids = sorted(class_ids)
        self.class_names = [vocabulary.entry(class_id).name for class_id in self.class_ids]
        self.folder = Path(output_dir) / PICTURES_FOLDER

    def attach(self, engine: Engine) -> None:
        """Run at the start, and after each case."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Make the folder, without the pictures of an earlier run."""
        if idist.get_rank() == 0:
            prepare_output_folder(self.folder)
            for old in self.folder.glob("*__*.png"):
                old.unlink()
        idist.barrier()  # no process may write before the first has cleared the folder

    def __call__(self, engine: Engine) -> None:
        """Draw the cases of an iteration, unless they failed."""
        state: Any = engine.state
        for case, output in zip(state.batch, state.output, strict=True) if state.output else ():
            self._draw(case, output["pred"])

    def _draw(self, case: Mapping[str, Any], prediction: Any) -> None:
        """Draw one case: image `(C, H, W, D)`, masks `(K, H, W, D)`."""
        image, predicted, truth = (convert_to_numpy(part) for part in (case["image"], prediction, case["label"]))
        for channel, (class_id, name) in enumerate(zip(self.class_ids, self.class_names, strict=True)):
            if class_id in case["annotated"] and truth[channel].any():
                masks = (np.asarray(mask[channel], dtype=bool) for mask in (predicted, truth))
                error_picture(image, *masks, path=self.folder / picture_name(case["case"], name))
