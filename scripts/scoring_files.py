"""Label maps of any program against the truth: two folders of files in, the scores of each case and class out."""

import csv
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientation
from monai.utils import convert_to_numpy
from tqdm import tqdm

from scripts.data.reading import find_inputs, read_label_map
from scripts.data.vocabulary import Vocabulary
from scripts.data.writing import BACKGROUND
from scripts.errors import InputError, PromptError
from scripts.metrics.masks import DEFAULT_TOLERANCE, check_tolerance
from scripts.metrics.pooling import POOLED_BATCH, check_pooled_batch
from scripts.metrics.scores import ClassScore, score_case, without_names
from scripts.metrics.summaries import check_protocol, summarise_units
from scripts.report.run_record import write_run_record
from scripts.report.tables import check_averaging, render_tables, write_scores_csv, write_summary_json

NAME_SUFFIXES: Final = ("seg", "segmentation", "pred", "prediction", "mask", "label", "labels", "gt", "truth")
"""What a file's stem may end with, behind an underscore, besides the name of its case."""

LABELS_FILE: Final = "labels.json"

# Largest difference (mm) between the entries of two affines that still count as one geometry.
_AFFINE_TOLERANCE: Final = 1e-3
_AXES: Final = "PLS"  # rows run towards the back, columns to the left, slices to the head, as in an evaluation
_SUFFIX: Final = re.compile(rf"_(?:{'|'.join(NAME_SUFFIXES)})$", re.IGNORECASE)
_CASES_NAMED: Final = 5

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LabelNames:
    """What the values of label maps mean.

    Attributes:
        classes: the values of each class, by its name; its first value is the number of the class.
        ignored: values that stand for none of the classes.
        partners: name of the lateral partner of each class that has one among the classes.
    """

    classes: Mapping[str, tuple[int, ...]]
    ignored: frozenset[int]
    partners: Mapping[str, str]

    @property
    def values(self) -> set[int]:
        """All values that are explained, the background's 0 included."""
        return {0, *self.ignored, *(value for values in self.classes.values() for value in values)}


@dataclass(frozen=True)
class ScoredFiles:
    """Two folders compared.

    Attributes:
        scores: one for each case and class, in the order of cases and classes.
        failures: reason by case, of those that could not be scored.
    """

    scores: tuple[ClassScore, ...]
    failures: Mapping[str, str]

    def raise_failures(self) -> None:
        """End with an error that names the cases which failed, where there are any.

        Raises:
            InputError: naming each case and its reason.
        """
        if self.failures:
            total = len({score.case for score in self.scores} | set(self.failures))
            reasons = "; ".join(f"{case} ({reason})" for case, reason in sorted(self.failures.items()))
            raise InputError(f"{len(self.failures)} of {total} cases failed: {reasons}")


@dataclass(frozen=True)
class Request:
    """What `automedsam score` was asked for.

    Attributes:
        predictions: folder of label maps.
        truth: folder of the true label maps.
        labels: JSON file of names by value, see ``score_files``.
        patients: CSV file with the columns case and patient, or None.
        tolerance: of the NSD, in mm for volumes and in pixels for planar cases.
        protocol: how the classes were asked for, "all" or "oracle".
        averaging: of the DSC in the table, "case", "slice", "dataset" or "batch-pooled".
        pooled_batch: cases in a batch of the batch-pooled DSC and IoU.
    """

    predictions: Path
    truth: Path
    labels: Path | None
    patients: Path | None
    tolerance: float
    protocol: str
    averaging: str
    pooled_batch: int = POOLED_BATCH


@dataclass(frozen=True)
class _Map:
    """A label map as (H, W, D) in display orientation; spacing in mm along these axes, 1 pixel where planar."""

    values: Labels
    affine: npt.NDArray[np.float64]
    spacing: tuple[float, ...]
    planar: bool


def score_folders(
    request: Request, output: Path, *, vocabulary: Vocabulary, progress: bool = False
) -> tuple[ScoredFiles, str]:
    """Score two folders and write `metrics.csv`, `summary.json` and `run.json`.

    Args:
        request: what to score.
        output: an existing folder.
        vocabulary: see ``score_files``.
        progress: whether to show a bar.

    Returns:
        The scores with the cases that failed, and the tables.

    Raises:
        InputError: see ``score_files``.
        ConfigError: an unknown protocol or averaging, a tolerance that is negative or not finite, or a batch without a
            case.
        OutputError: a file cannot be written.
    """
    start = time.monotonic()
    check_averaging(request.averaging)
    check_protocol(request.protocol)
    check_tolerance(request.tolerance)
    check_pooled_batch(request.pooled_batch)
    scored = score_files(
        request.predictions,
        request.truth,
        vocabulary=vocabulary,
        labels=request.labels,
        patients=request.patients,
        tolerance=request.tolerance,
        progress=progress,
    )
    summaries = summarise_units(scored.scores, protocol=request.protocol, pooled_batch=request.pooled_batch)
    write_scores_csv(scored.scores, output / "metrics.csv")
    write_summary_json(summaries, output / "summary.json")
    files = {name: getattr(request, name) for name in ("predictions", "truth", "labels", "patients")}
    settings = {name: getattr(request, name) for name in ("tolerance", "protocol", "averaging", "pooled_batch")}
    seconds = time.monotonic() - start
    write_run_record(output / "run.json", files=files, settings=settings, seconds=seconds, failed=scored.failures)
    return scored, render_tables(summaries, averaging=request.averaging)


def score_files(
    predictions: Path,
    truth: Path,
    *,
    vocabulary: Vocabulary,
    labels: Path | None = None,
    patients: Path | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: bool = False,
) -> ScoredFiles:
    """Score every label map of a folder against the one of the same case in another.

    A case's name is the file's stem without one of ``NAME_SUFFIXES``. Volumes are turned into one orientation first, so
    that files that store the same voxels along other axes with the right affine are compared rightly.

    Args:
        predictions: folder of label maps, see ``find_masks``.
        truth: folder of the true label maps.
        vocabulary: which class is the other side of which, and under which names classes go.
        labels: JSON file of the values' names, see ``read_label_names``; None takes ``labels.json`` in the folder of
            the predictions, and where there is none calls the classes ``value_1``, ``value_2``, ...
        patients: CSV file with the columns case and patient; a case that it does not name is its own patient.
        tolerance: of the NSD, in mm for volumes and in pixels for planar cases.
        progress: whether to show a bar.

    Returns:
        The scores, and the cases that failed: a prediction without truth or the reverse, another geometry, values
        without a name, an unreadable file.

    Raises:
        InputError: a folder without label maps, two folders that have no case in common, or a table of names or
            patients that cannot be read.
        ConfigError: the tolerance is negative or not finite.
    """
    pairs, failures = _pair(find_masks(predictions), find_masks(truth))
    names = _names_of(labels, predictions, pairs, vocabulary)
    owners = {} if patients is None else read_patients(patients)
    scores: list[ClassScore] = []
    for case, (predicted, true) in tqdm(sorted(pairs.items()), desc="scoring", disable=not progress, leave=False):
        try:
            scores += _score(case, predicted, true, names, patient=owners.get(case), tolerance=tolerance)
        except InputError as error:
            failures[case] = str(error)
    for case, reason in sorted(failures.items()):
        logger.error("%s: %s", case, reason)
    result = ScoredFiles(tuple(without_names(scores)), failures)
    if not scores:
        result.raise_failures()
    return result


def find_masks(folder: Path) -> dict[str, list[Any]]:
    """List the label maps of a folder by the names of their cases.

    A file named CASE_seg (or with another of ``NAME_SUFFIXES``) is the map of CASE; then the other files whose names
    are CASE or begin with CASE_, an overlay or the image itself perhaps, are left out, which the log tells. Without
    such a file, the map of CASE is the file of that name.

    Args:
        folder: a folder of NIfTI, PNG and other files; or one file.

    Returns:
        One or more paths by case; several are a mistake of the folder's.

    Raises:
        InputError: no such folder, or no image in it.
    """
    inputs = find_inputs(folder)
    marked = {item.name: _SUFFIX.sub("", item.name) for item in inputs if _SUFFIX.search(item.name)}
    found: dict[str, list[Any]] = {}
    left_out = []
    for item in inputs:
        if item.name not in marked and _belongs_to(item.name, marked.values()):
            left_out.append(item.name)
            continue
        found.setdefault(marked.get(item.name, item.name), []).append(item.image)
    if left_out:
        logger.warning("left out in %s, for a label map stands beside: %s", folder, ", ".join(left_out))
    return found


def read_label_names(path: Path, vocabulary: Vocabulary) -> LabelNames:
    """Read what values mean, from a file as `infer` writes it.

    Args:
        path: JSON: name by value, such as {"0": "background", "1": "liver"}. null stands for a value that is none of
            the classes, and several values may have one name. Names that the vocabulary has become its own.
        vocabulary: of the names and partners.

    Raises:
        InputError: the file is missing, no such JSON, or names no class.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a JSON file of names by value at {path}, got: {error}; give another") from error
    fits = isinstance(content, dict) and all(
        value.isdecimal() and (name is None or (isinstance(name, str) and name.strip()))
        for value, name in content.items()
    )
    if not fits:
        raise InputError(f'expected names by value in {path}, such as {{"1": "liver", "2": null}}, got {content!r}')
    return _explained({int(value): name for value, name in content.items()}, str(path), vocabulary)


def read_patients(path: Path) -> dict[str, str]:
    """Read which case is whose, from a CSV file with the columns case and patient.

    Raises:
        InputError: the file is missing, lacks a column or a value, or names a case twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"expected a CSV file with the columns case and patient at {path}, got: {error}") from error
    patients: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case, patient = row.get("case"), row.get("patient")
        if not case or not patient or case in patients:
            raise InputError(f"expected another case and its patient in row {number} of {path}, got {dict(row)}")
        patients[case] = patient
    return patients


# ------------------------------------------------------------------------------------------------------------- pairing


def _belongs_to(name: str, cases: Iterable[str]) -> bool:
    """Tell whether a file is named after a case that has a label map of its own."""
    return any(name == case or name.startswith(f"{case}_") for case in cases)


def _pair(
    predictions: Mapping[str, list[Any]], truth: Mapping[str, list[Any]]
) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
    """Put the files of a case together: pairs, and reasons for cases that have none."""
    if not set(predictions) & set(truth):
        raise InputError(
            f"expected predictions and truth of the same cases, got none in common: {_some(predictions)} against "
            f"{_some(truth)}; name them alike, but for an ending such as _seg or _gt"
        )
    pairs, failures = {}, {}
    for case in {**predictions, **truth}:
        reason = _unpaired(predictions.get(case, []), truth.get(case, []))
        if reason is None:
            pairs[case] = (predictions[case][0], truth[case][0])
        else:
            failures[case] = reason
    return pairs, failures


def _unpaired(predictions: Sequence[Any], truth: Sequence[Any]) -> str | None:
    """Say why a case's files are no pair."""
    for name, other, files, others in (
        ("prediction", "truth", predictions, truth),
        ("truth", "prediction", truth, predictions),
    ):
        if not files:
            return f"{other} without {name}: expected one of each; add the file or remove the {other}"
        if len(files) > 1 and others:
            return f"expected one {name}, got {len(files)} files of that case; leave one in the folder"
    return None


def _some(cases: Iterable[str]) -> str:
    """Name a few cases."""
    names = sorted(cases)
    return ", ".join(names[:_CASES_NAMED]) + (", ..." if len(names) > _CASES_NAMED else "")


# -------------------------------------------------------------------------------------------------------------- names


def _names_of(
    labels: Path | None, predictions: Path, pairs: Mapping[str, tuple[Any, Any]], vocabulary: Vocabulary
) -> LabelNames:
    """Find what the values mean, or call them by their numbers."""
    beside = predictions / LABELS_FILE
    if labels is None and beside.is_file():
        labels = beside
        logger.info("the names of the values are those of %s", beside)
    if labels is not None:
        return read_label_names(labels, vocabulary)
    values: set[int] = set()
    for pair in pairs.values():
        for path in pair:
            try:
                values |= set(np.unique(convert_to_numpy(read_label_map(path))).tolist())
            except InputError:
                continue  # told when the case is scored
    return _explained({value: f"value_{value}" for value in values - {0}}, "the label maps", vocabulary)


def _explained(names: Mapping[int, str | None], source: str, vocabulary: Vocabulary) -> LabelNames:
    """Sort values by class, and find which of the classes are partners."""
    classes: dict[str, tuple[int, ...]] = {}
    ignored = set()
    for value, name in sorted(names.items()):
        if name is None:
            ignored.add(value)
        elif value != 0 and name != BACKGROUND:
            known = _known_name(name, vocabulary)
            classes[known] = (*classes.get(known, ()), value)
    if not classes:
        raise InputError(f"expected the name of at least one class in {source}, got none besides the background")
    partners = {name: partner for name in classes if (partner := _partner(name, vocabulary)) in classes}
    return LabelNames(classes, frozenset(ignored), partners)


def _known_name(name: str, vocabulary: Vocabulary) -> str:
    """Give the vocabulary's own name of a class; one that it does not know stays as it is."""
    try:
        return name if name.strip().isdecimal() else vocabulary.resolve(name).name
    except PromptError:
        return name


def _partner(name: str, vocabulary: Vocabulary) -> str:
    """Name the lateral partner of a class; empty without one."""
    if name not in vocabulary.names:
        return ""
    partner = vocabulary.resolve(name).partner
    return "" if partner is None else vocabulary.entry(partner).name


# ------------------------------------------------------------------------------------------------------------- scoring


def _score(
    case: str, prediction: Any, truth: Any, names: LabelNames, *, patient: str | None, tolerance: float
) -> list[ClassScore]:
    """Score one case in all classes."""
    predicted, true = _read(prediction), _read(truth)
    _check_geometry(predicted, true)
    for label, values in (("prediction", predicted.values), ("truth", true.values)):
        _check_values(values, names, label)
    numbers = {name: values[0] for name, values in names.classes.items()}
    return score_case(
        _channels(predicted.values, names),
        _channels(true.values, names),
        case=case,
        class_ids=list(numbers.values()),
        class_names=list(numbers),
        spacing=None if true.planar else true.spacing,
        planar=true.planar,
        tolerance=tolerance,
        patient=patient,
        partners=[numbers.get(names.partners.get(name, "")) for name in numbers],
    )


def _read(path: Any) -> _Map:
    """Read a label map and bring its axes into the order of an evaluation's."""
    stored = read_label_map(path)
    planar = bool(stored.meta["planar"])
    # A single slice has no side to turn to: its picture plane stays one.
    turned: Any = stored.permute(0, 2, 1, 3) if planar else Orientation(_AXES, labels=None)(stored)
    affine = np.asarray(turned.affine, dtype=np.float64)
    spacing = tuple(float(edge) for edge in affine_to_spacing(affine))
    return _Map(convert_to_numpy(turned)[0], affine, spacing, planar)


def _check_geometry(prediction: _Map, truth: _Map) -> None:
    """Refuse a prediction that does not lie on the truth's grid.

    Raises:
        InputError: other lengths of the axes, or another affine of two volumes.
    """
    came, expected = prediction.values.shape, truth.values.shape
    if came != expected:
        advice = "resample the prediction onto the grid of the truth"
        if sorted(came) == sorted(expected):
            advice = "the same lengths in another order: swapped axes; transpose the array before it is written"
        raise InputError(
            f"expected the truth's {expected} voxels (rows, columns, slices) in the prediction, got {came}; {advice}"
        )
    difference = 0.0 if prediction.planar or truth.planar else float(np.abs(prediction.affine - truth.affine).max())
    if not difference <= _AFFINE_TOLERANCE:
        raise InputError(
            f"expected the truth's affine within {_AFFINE_TOLERANCE} mm in the prediction, got one that differs by up "
            f"to {difference:.4g}; resample the prediction onto the grid of the truth"
        )


def _check_values(values: Labels, names: LabelNames, label: str) -> None:
    """Refuse values that nobody has explained."""
    unknown = sorted(set(np.unique(values).tolist()) - names.values)
    if unknown:
        raise InputError(
            f"expected values of {sorted(names.values)} in the {label}, got {unknown[:10]} too; name them in the file "
            "of labels, or give null there to leave them out"
        )


def _channels(values: Labels, names: LabelNames) -> npt.NDArray[np.bool_]:
    """One mask per class, (K, H, W, D), of the values (H, W, D)."""
    return np.stack([np.isin(values, of_class) for of_class in names.classes.values()])
