"""Pictures of every case, of its errors and of the prompts' attention, written while the images are at hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from monai.utils import convert_to_numpy, convert_to_tensor

from scripts.data.fitting import fit_masks_to_square, network_slices
from scripts.data.vocabulary import Vocabulary
from scripts.data.writing import prepare_output_folder
from scripts.errors import ConfigError
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.image_encoders.levels import LevelEncoder
from scripts.report.attention_pictures import (
    ATTENTION_FOLDER,
    attention_files,
    attention_name,
    attention_picture,
    fullest_slice,
    write_attention_maps,
)
from scripts.report.error_pictures import PICTURES_FOLDER, error_picture, picture_name


class SaveErrorPictures:
    """Write `pictures/<case>__<class>.png` for each class that the truth of a case shows.

    A report takes its worst, median and best cases from them, and needs no data then.

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
        """Make the folder."""
        if idist.get_rank() == 0:
            prepare_output_folder(self.folder)
        idist.barrier()  # no process may write before the first has made it

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


class SaveAttentionPictures:
    """Write `attention/<case>.png` and `.npz`: what each abstract prompt attends to, level by level, on one slice.

    The slice is the one on which most is predicted, or the middle one. The picture shows it as the network takes it,
    padding included. Pictures and maps of an earlier evaluation in the same folder go when this one starts.

    Args:
        class_ids: of the channels of `pred`, ascending.
        vocabulary: their names and colours.
        network: an `HSPSAM` with abstract prompts, wrapped for several processes or not.
        output_dir: folder of the evaluation.

    Raises:
        ConfigError: the network has no abstract prompts.
    """

    def __init__(
        self, *, class_ids: Sequence[int], vocabulary: Vocabulary, network: torch.nn.Module, output_dir: str | Path
    ) -> None:
        self.classes = [vocabulary.entry(class_id) for class_id in sorted(class_ids)]
        self.network = _with_abstract_prompts(network)
        self.folder = Path(output_dir) / ATTENTION_FOLDER

    def attach(self, engine: Engine) -> None:
        """Run at the start, and after each case."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Make the folder, without what an earlier run left in it."""
        if idist.get_rank() == 0:
            prepare_output_folder(self.folder)
            for old in attention_files(self.folder):
                old.unlink()
        idist.barrier()  # no process may write before the first has cleared the folder

    def __call__(self, engine: Engine) -> None:
        """Draw the cases of an iteration, unless they failed."""
        state: Any = engine.state
        for case, output in zip(state.batch, state.output, strict=True) if state.output else ():
            self._draw(case, convert_to_numpy(output["pred"]).astype(bool), state.device)

    def _draw(self, case: Mapping[str, Any], predicted: np.ndarray, device: torch.device) -> None:
        """Draw one case: image `(C, H, W, D)`, masks `(K, H, W, D)`."""
        index, depth = fullest_slice(predicted), predicted.shape[-1]
        image = convert_to_tensor(case["image"], track_meta=False)[..., index : index + 1]
        size = self.network.image_size
        pixels = network_slices(image, size)  # (1, 3, S, S)
        masks = fit_masks_to_square(torch.from_numpy(predicted[None, ..., index].astype(np.uint8)), size)
        attention = self._attention(pixels.to(device))
        stem = self.folder / attention_name(case["case"])
        write_attention_maps(attention, index=index, path=f"{stem}.npz")
        attention_picture(
            255 * pixels[0].numpy(force=True),
            attention,
            masks[0].numpy().astype(bool),
            classes=self.classes,
            levels=len(cast(LevelEncoder, self.network.image_encoder).level_channels),
            title=case["case"] + (f", slice {index + 1} of {depth}" if depth > 1 else ""),
            path=f"{stem}.png",
        )

    def _attention(self, pixels: torch.Tensor) -> dict[int, np.ndarray]:
        """Explain one slice `(1, 3, S, S)`: level -> `(N, h, w)` float32."""
        with eval_mode(self.network):
            attention = self.network.explain(pixels).attention
        return {level: maps[0].float().numpy(force=True) for level, maps in attention.items()}


def _with_abstract_prompts(network: torch.nn.Module) -> HSPSAM:
    """Give the network itself, or refuse one that has nothing to show."""
    model = getattr(network, "module", network)
    if not isinstance(model, HSPSAM):
        raise ConfigError(
            f"attention pictures show what the abstract prompts of HSPSAM look at, and {type(model).__name__} has "
            "none: leave the pictures out"
        )
    if not len(model.abstract_prompts):
        prompts, source = model.settings["prompts"], model.settings["prompt_source"]
        raise ConfigError(
            "attention pictures show what abstract prompts look at, and this network has none (prompts: "
            f"{prompts}, prompt_source: {source}): leave the pictures out"
        )
    return model
