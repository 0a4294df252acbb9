"""Every case is read once, as training reads it: what it holds, and what is wrong with it."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from scripts.data.converters.finding import FoundCase
from scripts.data.guard import Finding, inspect_image
from scripts.data.reading import LoadImageCased, LoadLabeld
from scripts.data.vocabulary import Vocabulary
from scripts.errors import InputError


@dataclass(frozen=True)
class CaseSurvey:
    """What one case holds.

    Attributes:
        case: its name.
        slices: along Z; 1 for an image.
        voxels: class name -> voxels of it in the whole case.
        class_slices: class name -> slices that show it.
        spacing: edges of a voxel along the file's axes; mm, or 1 pixel where there is none.
        planar: whether there is no spacing between slices.
        intensity: smallest and largest stored value.
        content: SHA-256 of shape and voxels; equal for two copies, whatever their files.
        findings: of the guard.
    """

    case: str
    slices: int = 0
    voxels: Mapping[str, int] = field(default_factory=dict)
    class_slices: Mapping[str, int] = field(default_factory=dict)
    spacing: tuple[float, ...] = ()
    planar: bool = False
    intensity: tuple[float, float] = (0.0, 0.0)
    content: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def error(self) -> str | None:
        """The text of the first error, None without one."""
        return next((finding.text for finding in self.findings if finding.severity == "error"), None)


class Surveyor:
    """Reads cases; one for all, so that it can be sent to other processes.

    Args:
        vocabulary: gives classes their ids.
        label_map: value in label maps -> class name, None for values of no class.
        convert: writes a case's new files first and gives the case that points to them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        label_map: Mapping[int, str | None],
        convert: Callable[[FoundCase], FoundCase],
    ) -> None:
        self.vocabulary = vocabulary
        self.label_ids = {
            value: None if name is None else vocabulary.resolve(name).id for value, name in label_map.items()
        }
        self.convert = convert

    def __call__(self, found: FoundCase) -> tuple[FoundCase, CaseSurvey]:
        """Convert and read one case; what is wrong with it is among the findings."""
        if any(finding.severity == "error" for finding in found.findings):
            return found, CaseSurvey(case=found.name, findings=found.findings)
        try:
            case = self.convert(found)
            return case, self._survey(case)
        except InputError as error:
            text = str(error).removeprefix(f"{found.name}: ")  # a finding's text is without the case's name
            findings = (Finding("error", "reading", text), *found.findings)
            return found, CaseSurvey(case=found.name, findings=findings)

    def _survey(self, case: FoundCase) -> CaseSurvey:
        ids = self.annotated(case)
        # As in the configs; not through MONAI's Compose, which hides an error's own text.
        data: Any = self._as_data(case)
        data = LoadImageCased("image")(data)
        findings = [*case.findings, *inspect_image(data["image"], modality=case.modality)]
        if any(finding.severity == "error" for finding in findings):
            return CaseSurvey(case=case.name, findings=tuple(findings))
        data = LoadLabeld(ids, "label", log=False)(data)
        image, label = data["image"], data["label"].as_tensor()
        findings += data.get("findings", ())
        # (K, Z), a class at a time and by NumPy, which sums bytes without a copy eight times their size
        per_slice = np.stack([np.count_nonzero(mask, axis=(0, 1)) for mask in label.numpy()])
        names = [self.vocabulary.entry(class_id).name for class_id in ids]
        findings += _side_findings(label, image.affine.numpy(), ids, self.vocabulary)
        low, high = torch.aminmax(image.as_tensor())
        return CaseSurvey(
            case=case.name,
            slices=int(image.shape[3]),
            voxels=dict(zip(names, per_slice.sum(axis=1).tolist(), strict=True)),
            class_slices=dict(zip(names, (per_slice > 0).sum(axis=1).tolist(), strict=True)),
            spacing=tuple(round(float(edge), 6) for edge in image.meta["spacing"]),
            planar=bool(image.meta["planar"]),
            intensity=(float(low), float(high)),
            content=content_hash(image.as_tensor()),
            findings=tuple(findings),
        )

    def annotated(self, case: FoundCase) -> list[int]:
        """Give the ids of the classes that a case's label shows wherever they are."""
        if case.annotated is not None:
            names: Iterable[str] = case.annotated
        elif isinstance(case.label, dict):
            names = case.label
        else:
            return sorted({class_id for class_id in self.label_ids.values() if class_id is not None})
        return sorted({self.vocabulary.resolve(name).id for name in names})

    def _as_data(self, case: FoundCase) -> dict[str, Any]:
        label: Any = case.label
        if isinstance(label, dict):
            label = {self.vocabulary.resolve(name).id: _as_list(files) for name, files in label.items()}
        return {
            "case": case.name,
            "image": _as_list(case.image),
            "label": _as_list(label),
            "label_map": self.label_ids,
            "modality": case.modality,
        }


def _as_list(files: Any) -> Any:
    return list(files) if isinstance(files, tuple) else files


def content_hash(image: torch.Tensor) -> str:
    """Hash shape and voxels of an image.

    Args:
        image: `(C, X, Y, Z)`, of any type.
    """
    digest = hashlib.sha256(repr((tuple(image.shape), str(image.dtype))).encode())
    digest.update(np.ascontiguousarray(image.numpy()).data)
    return digest.hexdigest()


def _side_findings(
    label: torch.Tensor, affine: np.ndarray, ids: Sequence[int], vocabulary: Vocabulary
) -> list[Finding]:
    """Warn where a left structure lies to the right of its partner: sides exchanged, or an affine that is wrong."""
    findings = []
    for index, class_id in enumerate(ids):
        entry = vocabulary.entry(class_id)
        if entry.partner is None or entry.partner not in ids or "left" not in entry.name:
            continue
        left, right = (_rightness(label[place].numpy(), affine) for place in (index, ids.index(entry.partner)))
        if left is not None and right is not None and left > right:
            text = f"the {entry.name} lies to the right of its partner: sides exchanged in the label, or a wrong affine"
            findings.append(Finding(severity="warn", check="sides", text=text))
    return findings


def _rightness(mask: np.ndarray, affine: np.ndarray) -> float | None:
    """Give the R coordinate (mm) of a mask's centre, `(X, Y, Z)`; None for an empty one."""
    sums = [mask.sum(axis=others, dtype=np.int64) for others in ((1, 2), (0, 2), (0, 1))]
    total = sums[0].sum()
    if total == 0:
        return None
    centre = [float(np.arange(len(weights)) @ weights / total) for weights in sums]
    return float(affine[0, :3] @ centre + affine[0, 3])


def mark_copies(surveys: Sequence[CaseSurvey], *, sections: Mapping[str, str | None]) -> list[CaseSurvey]:
    """Find cases of equal content: an error where the owner's split has put them into different sections.

    The error stands at the copy that would teach (or choose) what the other is to test; leaving that one out mends it.

    Args:
        surveys: of all cases.
        sections: case -> section of the official split, None where there is none.

    Returns:
        The surveys, with a finding at each copy.
    """
    same: dict[str, list[str]] = defaultdict(list)
    for survey in surveys:
        if survey.content:
            same[survey.content].append(survey.case)
    return [
        replace(survey, findings=(*survey.findings, *_copy_findings(survey.case, same[survey.content], sections)))
        if survey.content
        else survey
        for survey in surveys
    ]


def _copy_findings(case: str, copies: Sequence[str], sections: Mapping[str, str | None]) -> list[Finding]:
    others = [copy for copy in copies if copy != case]
    if not others:
        return []
    most_telling = max(others, key=lambda copy: _tested_by(sections[copy]))
    own, other = sections[case], sections[most_telling]
    if _tested_by(own) < _tested_by(other):
        text = f"the same image as {most_telling} of the section {other}, while this one is of {own}"
        return [Finding(severity="error", check="copy", text=text)]
    return [Finding(severity="warn", check="copy", text=f"the same image as {most_telling}")]


def _tested_by(section: str | None) -> int:
    """Order sections by what they must not know: what teaches, what chooses, what tests."""
    return {None: 0, "training": 0, "validation": 1}.get(section, 2)
