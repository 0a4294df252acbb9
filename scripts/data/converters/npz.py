"""MedSAM's challenge files: .npz archives with `imgs` and `gts`, written anew as pictures and volumes.

Facts about these files (CVPR 2024, "Segment Anything in Medical Images on Laptop"):
https://github.com/bowang-lab/MedSAM/tree/LiteMedSAM

They hold no orientation: which side is left is not known, so paired structures cannot be told apart. Volumes hold only
slices with a label, one after the other, so distances across gaps are wrong.
"""

import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.lib.npyio import NpzFile

from scripts.data.converters.conversions import CONVERTED, save_nifti, save_picture
from scripts.data.converters.finding import Files, Found, FoundCase
from scripts.data.converters.patterns import FileTree
from scripts.data.guard import Finding
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError, PromptError

_COLOURS = 3
_LARGEST_BYTE = 255
_NO_ORIENTATION = Finding(
    severity="warn",
    check="orientation",
    text="npz files store no orientation: it is taken for the usual one, and left and right are a guess",
)


@dataclass(frozen=True)
class NpzRule:
    """What the label values of a group of files mean.

    Attributes:
        pattern: regular expression of the file names it holds for.
        modality: canonical name.
        classes: label value -> class name, None for a value of no class; the key 0 stands for every value above 0.
        patient: regular expression whose first group names the patient; empty for one a file.
        complete: whether `classes` explains every value, so that any other is an error instead of background.
    """

    pattern: str
    modality: str
    classes: Mapping[int, str | None]
    patient: str = ""
    complete: bool = False


def read_npz_rules(path: str | Path, vocabulary: Vocabulary) -> list[NpzRule]:
    """Read the rules for the published files.

    Args:
        path: `configs/npz_rules.yaml`.
        vocabulary: every class and modality must be in it.

    Raises:
        ConfigError: the file is not as described.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        rules = [NpzRule(**{**row, "modality": vocabulary.modality(row["modality"]).name}) for row in rows]
        for rule in rules:
            re.compile(rule.pattern), re.compile(rule.patient)
            for name in _class_names(rule):
                vocabulary.resolve(name)
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, re.error, PromptError) as error:
        raise ConfigError(f"The rules for npz files {path} cannot be used: {error}") from error
    return rules


def find_npz_cases(
    source: Path, *, output: Path, rules: list[NpzRule], vocabulary: Vocabulary, progress: Any = iter
) -> Found:
    """Write the cases of a folder of .npz files as PNG and NIfTI.

    Training files hold `imgs` and `gts` together; of validation files the images lie in `imgs/` and the labels under
    the same name in `gts/`. Label values in the new files are the vocabulary's ids. A file that cannot be used becomes
    a case with that error.

    Args:
        source: the folder, searched with all below it.
        output: new files go into `converted/` in it.
        rules: the first whose pattern fits a file's name says what its labels mean.
        vocabulary: gives classes their ids.
        progress: wraps the list of files, to show a bar.

    Returns:
        Cases and what was left out. Each .npz file is in one of the two, those of `gts/` with the image of their name.

    Raises:
        InputError: no .npz file there, two files of one name, or no label in any.
    """
    tree = FileTree(source)
    files = [path for path in tree.files if path.lower().endswith(".npz")]
    images = [path for path in files if not _is_labels_alone(path)]
    if not images:
        raise InputError(f"{source} holds no .npz file of images; give the folder of the challenge's files as --source")
    _require_unique(images)
    cases, skipped = [], []
    for path in progress(images):
        made = _make_case(source / path, output / CONVERTED, rules, vocabulary)
        if isinstance(made, str):
            skipped.append((path, made))
        else:
            cases.append(made)
    twins = {_twin(source / path) for path in images}
    others = [path for path in files if _is_labels_alone(path) and source / path not in twins]
    skipped += [(path, "label without a case") for path in others]
    if not cases:
        raise InputError(f"{source}: all {len(images)} .npz files are left out, the first because of: {skipped[0][1]}")
    names = sorted({name for case in cases for name in case.annotated or ()})
    return Found(
        name="medsam_npz",
        cases=tuple(cases),
        skipped=tuple(skipped),
        label_map={vocabulary.resolve(name).id: name for name in names},
        source={"layout": "medsam_npz"},
    )


def _is_labels_alone(path: str) -> bool:
    return "/gts/" in f"/{path}"


def _twin(path: Path) -> Path | None:
    """Give the file that holds the labels of one in `imgs/`; None where there is none."""
    twin = path.parent.parent / "gts" / path.name
    return twin if path.parent.name == "imgs" and twin.is_file() else None


def _require_unique(paths: Iterable[str]) -> None:
    """Refuse two files of one name: their cases would overwrite each other."""
    places: dict[str, str] = {}
    for path in paths:
        other = places.setdefault(Path(path).stem.casefold(), path)
        if other != path:
            raise InputError(f"{other} and {path} have the same name; give the folder of one of them as --source")


def _make_case(path: Path, folder: Path, rules: Iterable[NpzRule], vocabulary: Vocabulary) -> FoundCase | str:
    """Write the case of a file; gives the reason where it is to be left out."""
    rule = next((rule for rule in rules if re.search(rule.pattern, path.name)), None)
    if rule is None:
        return "nothing says what its label values mean; give --label-map and --modality"
    try:
        reader = _NpzFile(path, rule, vocabulary)
        if reader.labels is None:
            return "no label"
        if not reader.labels.any():
            return "none of its label values is a known class"
        return reader.write(reader.labels, folder)
    except InputError as error:
        finding = Finding("error", "reading", str(error))
        empty = FoundCase(path.stem, path.stem, None, image="", label="", modality=rule.modality)
        return replace(empty, annotated=_class_names(rule), findings=(finding,))


def _class_names(rule: NpzRule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in rule.classes.values() if name is not None))


class _NpzFile:
    """One archive, read without pickle."""

    def __init__(self, path: Path, rule: NpzRule, vocabulary: Vocabulary) -> None:
        self.path = path
        self.rule = rule
        arrays = _arrays(path)
        twin = _twin(path)
        if "gts" not in arrays and twin is not None:
            arrays |= {name: array for name, array in _arrays(twin).items() if name == "gts"}
        if "imgs" not in arrays:
            raise InputError(f"{path.name}: expected an array 'imgs', got {', '.join(arrays) or 'none'}")
        self.image = self._image(arrays["imgs"], flat=self._is_flat(arrays))
        self.spacing = self._spacing(arrays.get("spacing"))
        self.labels = None if "gts" not in arrays else self._labels(arrays["gts"], vocabulary)

    def _is_flat(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Tell whether it is one picture: by the label's axes, or by the spacing that only volumes have."""
        if "gts" in arrays:
            return arrays["gts"].ndim == 2
        return "spacing" not in arrays

    def _image(self, image: np.ndarray, *, flat: bool) -> np.ndarray:
        """Give `(H, W)` or `(H, W, 3)` of a picture, `(D, H, W)` of a volume, as bytes."""
        colours = image.ndim > (2 if flat else 3) and image.shape[-1] == _COLOURS
        if image.ndim != (2 if flat else 3) + colours or image.size == 0:
            raise InputError(f"{self.path.name}: expected imgs (H, W[, 3]) or (D, H, W[, 3]), got {image.shape}")
        image = _as_bytes(image, f"{self.path.name}: expected imgs as whole numbers in 0...255")
        if colours and (image == image[..., :1]).all():
            return image[..., 0]
        if colours and not flat:
            raise InputError(f"{self.path.name}: expected a grey volume, got one in colour {image.shape}")
        return image

    def _spacing(self, stored: np.ndarray | None) -> np.ndarray:
        """Give the edges of a voxel (x, y, z) in mm; 1 where the file has none."""
        spacing = np.ones(3) if stored is None else stored.reshape(-1)
        numbers = spacing.shape == (3,) and spacing.dtype.kind in "uif"
        if not (numbers and np.isfinite(spacing).all() and (spacing > 0).all()):
            raise InputError(f"{self.path.name}: expected spacing as 3 numbers above 0 mm (x, y, z), got {spacing}")
        return spacing.astype(float)

    def _labels(self, labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Give the vocabulary's ids in the image's shape, 0 where a value means no class."""
        shape = self.image.shape[:2] if self.image.ndim == labels.ndim + 1 else self.image.shape
        if labels.shape != shape or labels.dtype.kind not in "bui":
            raise InputError(
                f"{self.path.name}: expected gts {shape} of whole numbers, got {labels.shape} {labels.dtype}"
            )
        self._require_explained(labels)
        result = np.zeros(labels.shape, dtype=np.uint8)
        for value, name in self.rule.classes.items():
            if name is None:
                continue
            result[labels > 0 if value == 0 else labels == value] = vocabulary.resolve(name).id
        return result

    def _require_explained(self, labels: np.ndarray) -> None:
        """Refuse values without a meaning, where the rule gives all that there are."""
        if not self.rule.complete or 0 in self.rule.classes:
            return
        foreign = set(np.unique(labels).tolist()) - {0, *self.rule.classes}
        if foreign:
            raise InputError(f"{self.path.name}: its label values {sorted(foreign)} are not in --label-map; add them")

    def write(self, labels: np.ndarray, folder: Path) -> FoundCase:
        """Write image and label, and give the case that points to them."""
        name = self.path.stem
        image, label = self._write_pair(name, labels, folder)
        patient = re.search(self.rule.patient, name) if self.rule.patient else None
        return FoundCase(
            name=name,
            patient=name if patient is None else patient[1],
            section=None,
            image=image,
            label=label,
            modality=self.rule.modality,
            annotated=_class_names(self.rule),
            findings=() if labels.ndim == 2 else (_NO_ORIENTATION,),
        )

    def _write_pair(self, name: str, labels: np.ndarray, folder: Path) -> tuple[Files, Files]:
        if labels.ndim == 2:
            return (
                save_picture(self.image, folder / "images" / f"{name}.png"),
                save_picture(labels, folder / "labels" / f"{name}.png"),
            )
        # Arrays are (z, y, x) of ITK, whose x and y point left and back, while NIfTI's point right and forward.
        affine = np.diag([-self.spacing[0], -self.spacing[1], self.spacing[2], 1.0])
        return (
            save_nifti(self.image.transpose(2, 1, 0), affine, folder / "images" / f"{name}.nii.gz"),
            save_nifti(labels.transpose(2, 1, 0), affine, folder / "labels" / f"{name}.nii.gz"),
        )


def _as_bytes(values: np.ndarray, expected: str) -> np.ndarray:
    """Make uint8 of numbers that are bytes already, whatever they are stored as."""
    if values.dtype.kind not in "buif":
        raise InputError(f"{expected}, got {values.dtype}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= _LARGEST_BYTE):
        raise InputError(f"{expected}, got {low:g} to {high:g}")
    result = values.astype(np.uint8)
    if not np.array_equal(result, values):
        raise InputError(f"{expected}, got fractions from {low:g} to {high:g}")
    return result


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an archive that this bundle knows; nothing is ever unpickled."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise InputError(f"{path.name}: expected an .npz archive, got a single array")
        with archive:
            return {name: archive[name] for name in ("imgs", "gts", "spacing") if name in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path.name}: expected plain arrays in a complete .npz, got something else") from error
