"""What the trainer and the evaluator hand to the network from a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.engines import PrepareBatch
from monai.utils import convert_to_tensor

from scripts.errors import ConfigError
from scripts.losses.joint import PromptTargets


def diffusion_noise(seeds: torch.Tensor, *, prompts: int, grid_size: int, channels: int = 256) -> torch.Tensor:
    """Draw the noise of each image's prompts from the image's own seed, so that batch and rank do not matter.

    Args:
        seeds: `(B,)` int64.
        prompts: K.
        grid_size: h = w of the embedding.
        channels: of the embedding.

    Returns:
        Standard normal values `(B, K, channels, h, w)`.
    """
    shape = (prompts, channels, grid_size, grid_size)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()])


def diffusion_timesteps(seeds: torch.Tensor, *, prompts: int, steps: int) -> torch.Tensor:
    """Draw t uniformly from 1...T for each image's prompts, `(B, K)`.

    The paper does not say which t is decoded: uniform in training and T afterwards is this project's choice.
    """
    rows = [
        torch.randint(1, steps + 1, (prompts,), generator=torch.Generator().manual_seed(seed + 1))
        for seed in seeds.tolist()
    ]
    return torch.stack(rows)


def drawn_share(seeds: torch.Tensor, *, prompts: int, share: float) -> torch.Tensor:
    """Draw a share of each image's prompts from the image's own seed, `(B, K)` bool."""
    rows = [torch.rand(prompts, generator=torch.Generator().manual_seed(seed + 2)) for seed in seeds.tolist()]
    return torch.stack(rows) < share


class PreparePromptBatch(PrepareBatch):
    """Make the network's arguments and the loss's targets of a batch of `PromptedSlices`.

    Args:
        grid_size: h = w of the network's embedding.
        diffusion_steps: T.
        box_share: of the classes that are in their image, how many are asked for by their box in place of their name,
            so that the mask decoder learns boxes too, 0 to 1.

    Raises:
        ConfigError: a share that is none.
    """

    def __init__(self, *, grid_size: int, diffusion_steps: int, box_share: float = 0.0) -> None:
        if not 0 <= box_share <= 1:
            raise ConfigError(f"box_share is a share from 0 to 1, not {box_share}")
        self.grid_size = grid_size
        self.diffusion_steps = diffusion_steps
        self.box_share = box_share

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, PromptTargets, tuple[()], dict[str, Any]]:
        """Return image or stored embedding, targets, no further positional arguments, and the network's keywords."""
        seeds, prompts = batchdata["noise_seed"], batchdata["class_id"].shape[1]
        arguments = {
            "class_ids": batchdata["class_id"],
            "noise": diffusion_noise(seeds, prompts=prompts, grid_size=self.grid_size),
            "timestep": diffusion_timesteps(seeds, prompts=prompts, steps=self.diffusion_steps),
            "box": batchdata["box"],
        }
        if self.box_share:
            chosen = drawn_share(seeds, prompts=prompts, share=self.box_share)
            arguments["by_box"] = chosen & batchdata["present"]
        targets = PromptTargets(batchdata["label"], batchdata["distance"], batchdata["present"])

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, non_blocking=non_blocking)

        moved: dict[str, Any] = {name: move(value) for name, value in arguments.items()}
        seen = batchdata.get("image")
        if seen is None:
            seen, moved["embedded"] = batchdata["embedding"].float(), True
        return move(seen).to(**kwargs), PromptTargets(*map(move, targets)), (), moved


class PrepareLabelBatch(PrepareBatch):
    """Make the arguments of a network without prompts, and the loss's target, of a batch of `LabelledSlices`."""

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[()], dict[str, Any]]:
        """Return images, masks `(B, K, S, S)`, no further positional arguments, and the network's keywords."""
        image, label = (batchdata[name].to(device=device, non_blocking=non_blocking) for name in ("image", "label"))
        return image.to(**kwargs), label, (), {"known_only": True}


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Find the tight box of each class in each slice.

    Args:
        masks: `(K, H, W, D)`, 0 where the class is not.

    Returns:
        `(K, D, 4)` float32: x_min, y_min, x_max, y_max in the case's own pixels, corners inclusive; NaN for a class
        that is not in the slice.
    """
    found = masks.bool()
    least, largest = [], []
    for axis in (1, 2):  # over the rows, which leaves the columns (K, W, D), then over the columns
        line = found.any(dim=axis)
        places = torch.arange(line.shape[1], dtype=torch.float32).reshape(1, -1, 1)
        least.append(torch.where(line, places, torch.inf).amin(dim=1))
        largest.append(torch.where(line, places, -torch.inf).amax(dim=1))
    boxes = torch.stack((*least, *largest), dim=-1)  # (K, D, 4)
    return torch.where(boxes.isinf(), torch.nan, boxes)


class PrepareCase(PrepareBatch):
    """Make the inferer's arguments of a batch that is one whole case, without a batch axis.

    Args:
        class_ids: the K classes of the answer's channels; None leaves them to what the case itself asks for, see
            `scripts.data.placing.PlacePromptsd`.
        presence: `all` asks for every annotated class in every slice; `oracle` only for those that the truth has
            there, as the paper's group evaluates. The two must never share a table.
        boxes: whether to hand over the true boxes too, for `BoxPromptInferer`. Where a class is not, there is no box,
            so that these can only be asked for with `oracle`.

    Raises:
        ConfigError: an unknown presence, or boxes with another one than `oracle`.
    """

    def __init__(
        self,
        *,
        class_ids: Sequence[int] | None = None,
        presence: Literal["all", "oracle"] = "all",
        boxes: bool = False,
    ) -> None:
        if presence not in ("all", "oracle"):
            raise ConfigError(f"presence is 'all' or 'oracle', not '{presence}'")
        if boxes and (presence != "oracle" or class_ids is None):
            raise ConfigError("boxes of the truth know where a class is: give class_ids, and set presence to 'oracle'")
        self.boxes = boxes
        self.class_ids = None if class_ids is None else sorted(class_ids)
        self.presence = presence

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[()], dict[str, Any]]:
        """Return the image (1, C, H, W, D), its label if any, and which classes to ask for where."""
        # With its metadata where the case itself asks: there the inferer finds what for.
        image = convert_to_tensor(batchdata["image"], track_meta=self.class_ids is None)
        label = convert_to_tensor(batchdata.get("label"), track_meta=False)
        arguments: dict[str, Any] = {"case": batchdata["case"]}
        if self.class_ids is not None:
            arguments["class_ids"] = self.class_ids
            arguments["modality"] = batchdata.get("modality")  # else it is in the metadata too
            arguments["presence"] = self._questions(batchdata)
        if self.boxes:
            arguments["boxes"] = tight_boxes(convert_to_tensor(batchdata["label"], track_meta=False)).unsqueeze(0)
        image = image.unsqueeze(0).to(device=device, non_blocking=non_blocking).to(**kwargs)
        if label is not None:
            label = label.unsqueeze(0).to(device=device, non_blocking=non_blocking)
        return image, label, (), arguments

    def _questions(self, batchdata: Mapping[str, Any]) -> torch.Tensor:
        """Decide which class to ask for in which slice, (1, K, D) bool."""
        annotated = torch.tensor([class_id in batchdata["annotated"] for class_id in self.class_ids or ()])
        questions = annotated.reshape(1, -1, 1).expand(1, -1, batchdata["image"].shape[-1])
        if self.presence == "all":
            return questions
        label = convert_to_tensor(batchdata["label"], track_meta=False)
        found = label.bool().flatten(1, 2).any(dim=1)  # (K, H, W, D) -> (K, D)
        return questions & found.unsqueeze(0)


def only_case(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate a batch of one: the case as it is, see `CaseEvaluator`."""
    (case,) = cases
    return case
