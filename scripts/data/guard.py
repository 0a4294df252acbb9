"""What an image must be like before anything is computed from it, and what a person should know about it."""

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from scripts.errors import InputError

logger = logging.getLogger(__name__)

# Cosine of the angle between two axes up to which they count as perpendicular: rounded DICOM directions stay far below,
# a tilted gantry (1 degree is 0.017) lies above.
_ORTHOGONALITY_TOLERANCE = 1e-2
# Voxel edges in mm that a clinical scanner can produce.
_SPACING_RANGE = (1e-2, 1e2)

# Air is -1000 HU and present around, if not in, every body part; only metal lies above 5000 HU.
_HU_RANGE = (-400.0, 5000.0)
# Fat, muscle, organs and blood with contrast agent, in HU, and the least share of the voxels that they are.
_SOFT_TISSUE = (-200.0, 300.0)
_LEAST_SOFT_TISSUE = 0.01
# The same after 1024 (or 1000) was added. Nothing below the first value is tissue or air: scanners pad with -2000.
_PADDING = -1100.0
_CLEARLY_NEGATIVE = -100.0
_SHIFTED_TISSUE = (900.0, 1200.0)
_SHIFTED_AIR = 200.0
# Values of a CT that was stored as a picture.
_WINDOWED_RANGE = (0.0, 255.0)
# An MR image has no values far below 0; a CT has, wherever there is air.
_LOWEST_MR = -500.0

_GREY_MODALITIES = ("CT", "MR", "xray", "ultrasound")
_COLOUR_MODALITIES = ("endoscopy", "dermoscopy", "fundus")
# A picture is in colour when in so many of its pixels the channels lie so far apart (share of the image's range).
_COLOURED_PIXELS = 0.01
_COLOUR_DISTANCE = 0.05

# Shares are taken over about so many voxels on a regular grid.
_SAMPLE_SIZE = 1_000_000
_SLICES_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """Something about a case's files that a person has to know.

    Attributes:
        severity: "error" where the case cannot be used, "warn" where it can but may not be what it seems.
        check: short name of the check, such as "hounsfield".
        text: what was expected, what came and what to do, in one line and without the case's name.
    """

    severity: Literal["error", "warn"]
    check: str
    text: str


def inspect_image(image: MetaTensor, *, modality: str | None) -> list[Finding]:
    """Look for everything about an image that a person has to know.

    Errors: wrong number of axes or channels, no voxels ("shape"); NaN or infinity, one value everywhere ("values"); an
    affine that is missing, singular or not orthogonal ("affine"), a voxel size of 0 or beyond any scanner's
    ("spacing"), a planar image that is not axial, for its picture plane would be lost when axes are brought into order
    ("orientation"); another modality than the file's own ("modality"); CT shifted by 1024 ("hounsfield").

    Warnings: a NIfTI file that stores no orientation ("orientation"), slices with one value everywhere
    ("constant-slices"), colour where the modality is grey or the reverse ("colour"), CT in 0..255 ("windowed") or
    otherwise no plausible HU ("hounsfield"), MR that looks like HU ("modality").

    Args:
        image: ``(C, X, Y, Z)`` in file axes as ``read_image`` returns it. It is not copied.
        modality: canonical name of the modality; None when unknown, which leaves out the checks that need it.

    Returns:
        Errors before warnings; an image with an error about shape, values or geometry is not looked at any further.
    """
    if found := _inspect_shape(image):
        return found
    geometry = _inspect_geometry(image)
    values = _plain(image)
    axis = 3 if geometry else _slice_axis(image)
    others = [other for other in range(4) if other != axis]
    low, high = values.amin(dim=others), values.amax(dim=others)  # (slices,); they hand NaN on
    errors = [*_inspect_values(values, low, high), *geometry, *_inspect_origin(image, modality)]
    if errors:
        return errors
    limits = (float(low.min()), float(high.max()))
    found = [
        *_inspect_orientation(image),
        *_inspect_slices(low == high, "XYZ"[axis - 1]),
        *_inspect_colour(values, limits, modality),
        *_inspect_intensities(image, limits, modality),
    ]
    return sorted(found, key=lambda finding: finding.severity)  # "error" < "warn"


def check_image(image: MetaTensor, *, case: str, modality: str | None, strict: bool = False) -> None:
    """Refuse an image that no network can make sense of; warn in the log of what is only doubtful.

    Args:
        image: ``(C, X, Y, Z)`` in file axes as ``read_image`` returns it.
        case: name for messages.
        modality: canonical name of the modality; None when unknown.
        strict: refuse what is doubtful as well.

    Raises:
        InputError: the first error that ``inspect_image`` finds, or the first warning if ``strict``.
    """
    enforce(inspect_image(image, modality=modality), case=case, strict=strict)


def enforce(findings: Iterable[Finding], *, case: str, strict: bool = False, log: bool = True) -> None:
    """Stop at errors, and log warnings.

    Args:
        findings: of one case.
        case: name for messages.
        strict: stop at warnings as well.
        log: whether warnings go to the log.

    Raises:
        InputError: the first error, or the first warning if ``strict``.
    """
    ranked = sorted(findings, key=lambda finding: finding.severity)
    for finding in ranked:
        if finding.severity == "error":
            raise InputError(f"{case}: {finding.text}")
        if strict:
            raise InputError(f"{case}: {finding.text} (a warning, refused because of strict)")
        if log:
            logger.warning("%s: %s", case, finding.text)


# ---------------------------------------------------------------------------------------------------------- geometry


def _inspect_shape(image: torch.Tensor) -> list[Finding]:
    """Report other shapes than (1 or 3, X, Y, Z) with voxels."""
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[0] not in (1, 3):
        text = f"expected an image (channels, X, Y, Z) with 1 or 3 channels, got the shape {shape}"
        return [Finding("error", "shape", f"{text}; save one time point or channel per file")]
    if image.numel() == 0:
        text = f"expected at least one voxel along every axis, got the shape {shape}; fetch the file again"
        return [Finding("error", "shape", text)]
    return []


def _inspect_geometry(image: torch.Tensor) -> list[Finding]:
    """Report an affine that is no right-angled grid of plausible size."""
    if not isinstance(image, MetaTensor):
        text = f"expected an image with an affine (voxel -> mm), got a plain {type(image).__name__}"
        return [Finding("error", "affine", f"{text}; read it with LoadImageCased")]
    affine = image.affine.cpu().numpy()
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        text = f"expected a finite 4x4 affine (voxel -> mm), got {affine.tolist()}; correct the file's header"
        return [Finding("error", "affine", text)]
    axes = affine[:3, :3].astype(np.float64)
    return _inspect_spacing(axes) or _inspect_angles(axes) or _inspect_picture_plane(image, affine)


def _inspect_spacing(axes: np.ndarray) -> list[Finding]:
    """Report voxel edges that no scanner produces; ``axes`` is ``(3, 3)``, a column for each voxel axis."""
    spacing = np.linalg.norm(axes, axis=0)
    low, high = _SPACING_RANGE
    if ((spacing >= low) & (spacing <= high)).all():
        return []
    edges = " x ".join(f"{edge:g}" for edge in spacing)
    text = f"expected voxel edges between {low:g} and {high:g} mm, got {edges}; correct the affine in the file's header"
    return [Finding("error", "spacing", text)]


def _inspect_angles(axes: np.ndarray) -> list[Finding]:
    """Report axes that are not perpendicular."""
    unit = axes / np.linalg.norm(axes, axis=0)
    deviation = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if deviation <= _ORTHOGONALITY_TOLERANCE:
        return []
    text = (
        f"expected perpendicular axes in the affine, got a cosine of {deviation:.3g} between two of them "
        "(tilted gantry or damaged header); resample the volume to a right-angled grid"
    )
    return [Finding("error", "affine", text)]


def _inspect_picture_plane(image: MetaTensor, affine: np.ndarray) -> list[Finding]:
    """Report planar images whose normal is not the head-foot axis."""
    normal = nibabel.aff2axcodes(affine)[2]
    if not image.meta.get("planar", False) or normal in ("S", "I"):
        return []
    text = (
        f"expected an axial slice or a picture without orientation, got slices that face {normal}; "
        "save it as PNG or TIFF to segment it as a picture"
    )
    return [Finding("error", "orientation", text)]


def _inspect_orientation(image: MetaTensor) -> list[Finding]:
    """Report files that could have stored an orientation and did not."""
    if image.meta.get("picture", False) or image.meta.get("oriented", True):
        return []
    text = (
        "expected a NIfTI file with an orientation, got sform and qform codes of 0: which side is left is a guess; "
        "convert the original again, or set the sform after a look at a viewer"
    )
    return [Finding("warn", "orientation", text)]


def _slice_axis(image: MetaTensor) -> int:
    """Return the axis of ``(C, X, Y, Z)`` that runs from foot to head, along which slices are taken."""
    order = nibabel.io_orientation(image.affine.cpu().numpy())[:, 0]  # for X, Y, Z: the patient's axis
    return 1 + int(np.argmax(order == 2))


# ------------------------------------------------------------------------------------------------------------ values


def _inspect_values(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> list[Finding]:
    """Report values that are not finite, or all the same; ``low`` and ``high`` are the slices' extremes."""
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        count = sum(int((~torch.isfinite(part)).sum()) for part in values.unbind(1))
        text = f"expected finite values, got NaN or infinity in {count} of {values.numel()} voxels; mend the voxels"
        return [Finding("error", "values", text)]
    if low.min() == high.max():
        text = f"expected an image with contrast, got the value {float(low.min()):g} everywhere; fetch the file again"
        return [Finding("error", "values", text)]
    return []


def _inspect_slices(constant: torch.Tensor, axis: str) -> list[Finding]:
    """Report slices with one value everywhere; ``constant`` is ``(slices,)`` bool."""
    empty = constant.nonzero().flatten().tolist()
    if not empty:
        return []
    named = ", ".join(str(index) for index in empty[:_SLICES_NAMED]) + (", ..." if len(empty) > _SLICES_NAMED else "")
    text = (
        f"expected contrast in every slice, got one value everywhere in {len(empty)} of {len(constant)} slices "
        f"(along {axis}, from 0: {named}); look whether the file is complete"
    )
    return [Finding("warn", "constant-slices", text)]


def _inspect_colour(values: torch.Tensor, limits: tuple[float, float], modality: str | None) -> list[Finding]:
    """Report colours where the modality has none, and grey where it has."""
    if modality not in (*_GREY_MODALITIES, *_COLOUR_MODALITIES):
        return []
    coloured = _is_coloured(values, limits)
    if coloured and modality in _GREY_MODALITIES:
        text = f"expected grey values of {modality}, got a colour image; look whether it is a screenshot or fused"
        return [Finding("warn", "colour", text)]
    if not coloured and modality in _COLOUR_MODALITIES:
        text = f"expected a colour image of {modality}, got grey values; take the original, or name another modality"
        return [Finding("warn", "colour", text)]
    return []


def _is_coloured(values: torch.Tensor, limits: tuple[float, float]) -> bool:
    """Tell whether the channels really differ; compression leaves small differences in a grey image."""
    sample = _sample(values)  # (C, n)
    distance = sample.amax(dim=0) - sample.amin(dim=0)
    return _share(distance > _COLOUR_DISTANCE * (limits[1] - limits[0])) > _COLOURED_PIXELS


# ---------------------------------------------------------------------------------------------------------- modality


def _inspect_origin(image: torch.Tensor, modality: str | None) -> list[Finding]:
    """Report a modality that contradicts the file's own."""
    stored = getattr(image, "meta", {}).get("modality")
    if stored is None or modality is None or stored == modality:
        return []
    text = f"expected {modality}, got a file that says it is {stored}; correct the modality that was named"
    return [Finding("error", "modality", text)]


def _inspect_intensities(image: MetaTensor, limits: tuple[float, float], modality: str | None) -> list[Finding]:
    """Report values that the modality does not produce."""
    if modality == "MR" and limits[0] < _LOWEST_MR:
        text = (
            f"expected values of MR, got {_range(limits)}, which look like Hounsfield units; "
            "name the modality CT if it is one"
        )
        return [Finding("warn", "modality", text)]
    if modality != "CT":
        return []
    if limits[0] >= _WINDOWED_RANGE[0] and limits[1] <= _WINDOWED_RANGE[1]:
        return _inspect_windowed(image, limits)
    return _inspect_hounsfield(_sample(_plain(image)).flatten(), limits)


def _inspect_windowed(image: MetaTensor, limits: tuple[float, float]) -> list[Finding]:
    """Report a volume of CT in 0..255; 8-bit pictures can hold nothing else."""
    if image.meta.get("picture", False):
        return []
    text = (
        f"expected Hounsfield units, got {_range(limits)}: taken as windowed already and not windowed again; "
        "take the original if it is not"
    )
    return [Finding("warn", "windowed", text)]


def _inspect_hounsfield(sample: torch.Tensor, limits: tuple[float, float]) -> list[Finding]:
    """Report CT values that are no HU; ``sample`` is ``(n,)``."""
    if _is_shifted(sample):
        text = (
            f"expected Hounsfield units, got {_range(limits)} with soft tissue around 1024: "
            "subtract 1024, or apply the file's rescale intercept"
        )
        return [Finding("error", "hounsfield", text)]
    if limits[0] > _HU_RANGE[0] or limits[1] > _HU_RANGE[1]:
        text = (
            f"expected Hounsfield units with air below {_HU_RANGE[0]:g} and nothing above {_HU_RANGE[1]:g}, "
            f"got {_range(limits)}; check the rescale slope and intercept"
        )
        return [Finding("warn", "hounsfield", text)]
    share = _share_between(sample, _SOFT_TISSUE)
    if share < _LEAST_SOFT_TISSUE:
        text = (
            f"expected Hounsfield units with soft tissue between {_SOFT_TISSUE[0]:g} and {_SOFT_TISSUE[1]:g}, "
            f"got {share:.1%} of the voxels there; check the rescale slope and intercept"
        )
        return [Finding("warn", "hounsfield", text)]
    return []


def _is_shifted(sample: torch.Tensor) -> bool:
    """Tell whether 1024 was added to HU.

    Three things together: next to nothing lies where air and fat are in HU; some of the voxels lie where soft tissue is
    once 1024 was added; and of all that is neither air then nor soft tissue now, much lies there. The last tells
    shifted soft tissue, a narrow peak, from bone, which spreads from 200 HU far beyond 1200.
    """
    sample = sample[sample > _PADDING]
    above_air = sample[sample > _SHIFTED_AIR]
    return (
        _share(sample < _CLEARLY_NEGATIVE) < 0.001
        and _share_between(sample, _SHIFTED_TISSUE) > 0.02
        and _share_between(above_air, _SHIFTED_TISSUE) > 0.4
    )


def _sample(values: torch.Tensor) -> torch.Tensor:
    """Take about a million of the voxels ``(C, X, Y, Z)`` on a regular grid, ``(C, n)``."""
    step = max(1, math.isqrt(values[0].numel() // _SAMPLE_SIZE))
    return values[:, ::step, ::step].flatten(1)


def _share(chosen: torch.Tensor) -> float:
    """Return the share of True; 0 of nothing."""
    return float(chosen.float().mean()) if chosen.numel() else 0.0


def _share_between(values: torch.Tensor, limits: Sequence[float]) -> float:
    """Return the share of the values within limits, both included."""
    return _share((values >= limits[0]) & (values <= limits[1]))


def _range(limits: tuple[float, float]) -> str:
    """Say from where to where values reach."""
    return f"values from {limits[0]:g} to {limits[1]:g}"


def _plain(image: torch.Tensor) -> torch.Tensor:
    """Return the voxels without metadata."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


class Guardd(MapTransform):
    """Runs ``inspect_image`` on images as they come from the reader, before their axes are reordered.

    What is only doubtful is appended to the list ``findings`` of the case.

    Args:
        keys: keys of the images.
        case_key: key of the case's name; the image's file name stands in where it is absent.
        modality_key: key of the modality's canonical name.
        strict: refuse what is doubtful as well.
        log: whether warnings go to the log.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        InputError: see ``check_image``.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        *,
        case_key: str = "case",
        modality_key: str = "modality",
        strict: bool = False,
        log: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.case_key = case_key
        self.modality_key = modality_key
        self.strict = strict
        self.log = log

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the images unchanged and their warnings in ``findings``."""
        result = dict(data)
        result["findings"] = list(result.get("findings", []))
        for key in self.key_iterator(result):
            meta = getattr(result[key], "meta", {})
            case = result.get(self.case_key) or meta.get("filename_or_obj", str(key))
            found = inspect_image(result[key], modality=result.get(self.modality_key))
            enforce(found, case=str(case), strict=self.strict, log=self.log)
            result["findings"] += found
        return result
