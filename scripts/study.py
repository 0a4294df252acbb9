"""`automedsam study`: train and evaluate the rows of one of the paper's tables, and set them beside its figures.

All rows start from the same weights: image encoder, prompt encoder and mask decoder of one file, and a new class prompt
encoder. The image encoder is frozen, so that all rows share one store of its answers. What is complete is not run
again, as long as its settings, its data and its starting weights are the same.
"""

import hashlib
import json
import logging
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from scripts.data.datalist import read_datalist
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError
from scripts.files import atomic_path
from scripts.metrics.scores import ClassScore
from scripts.metrics.statistics import Values, class_intervals, compare_runs
from scripts.metrics.summaries import PROTOCOLS
from scripts.report.study_tables import RowOutcome, Scores, render_study, write_study
from scripts.report.tables import read_scores_csv
from scripts.study_rows import StudyRow, StudyTable
from scripts.workflow import BUNDLE_ROOT, CONFIGS, as_setting

logger = logging.getLogger(__name__)
TABLES = CONFIGS / "experiments" / "tables"
MARKER = "complete.json"
BOXES = "validate#evaluator#prepare_batch#boxes"
CLASS_PROMPT_PREFIX = "class_prompt_encoder."
# The study says itself where data are and results go, and which protocol and seed a run has.
_OWN_SETTINGS = (
    "dataset_dir",
    "datalist",
    "output_dir",
    "validation_section",
    "presence",
    "checkpoint",
    "resume",
    "seed",
)
# What changes no figure, and so does not make a complete run incomplete.
_NEUTRAL_SETTINGS = ("progress_bar", "tensorboard", "num_workers", "embeddings_dir")


@dataclass(frozen=True)
class StudyPlan:
    """What to run, and where.

    Attributes:
        table: its rows.
        datalists: name of a data set -> its datalist, or several that are trained as one.
        output: an existing folder.
        settings: of `configs/train.json`, for all rows.
        seeds: of the trainings.
        noise_seeds: of the network's own noise at evaluation; empty for an evaluation without noise alone.
        section: which cases are evaluated.
        presence: the protocol, `all` or `oracle`.
        only: names of the rows to run; None for all.
    """

    table: StudyTable
    datalists: Mapping[str, Any]
    output: Path
    settings: Mapping[str, Any]
    seeds: Sequence[int] = (0,)
    noise_seeds: Sequence[int] = ()
    section: str = "test"
    presence: str = "all"
    only: Sequence[str] | None = None


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended.

    Attributes:
        text: the table.
        failures: name of a row -> why it failed.
    """

    text: str
    failures: Mapping[str, str]


def read_overlays(paths: Sequence[Path]) -> dict[str, Any]:
    """Read overlays as settings, which apply to training and evaluation alike.

    Raises:
        ConfigError: an overlay that adds to a part instead of setting it.
    """
    from monai.bundle import ConfigParser

    settings: dict[str, Any] = {}
    for path in paths:
        settings |= ConfigParser.load_config_file(str(path))
    added = [name for name in settings if name.startswith("+")]
    if added:
        raise ConfigError(f"a study takes overlays that set whole settings, but {', '.join(added)} adds to one")
    return {name: value for name, value in settings.items() if name not in (*_OWN_SETTINGS, "class_ids")}


def run_study(plan: StudyPlan) -> StudyOutcome:
    """Run what is not complete, and make the table of all that is.

    Returns:
        The table, which also stands in `table.txt`, `study.csv` and `study.json` of the output folder, and the rows
        that failed.

    Raises:
        ConfigError: an unknown row in `only`, or a setting that the study itself decides.
    """
    _require_sense(plan)
    chosen = [row.name for row in plan.table.rows]
    if plan.only is not None:
        chosen = [plan.table.row(name).name for name in plan.only]
    study = _Study(plan)
    failures: dict[str, str] = {}
    for number, row in enumerate(plan.table.rows, start=1):
        if row.name in chosen and study.reason_not_to_run(row) is None:
            logger.info("row %d of %d: %s", number, len(plan.table.rows), row.name)
            reason = study.run(row)
            if reason is not None:
                failures[row.name] = reason
                logger.error("the row '%s' failed: %s", row.name, reason)
    rows = [study.outcome(row, failures.get(row.name)) for row in plan.table.rows]
    text = render_study(rows, title=f"{plan.table.name}: {plan.table.title}", caption=study.caption())
    write_study(rows, plan.output, text=text, about={"table": plan.table.name, "caption": study.caption()})
    return StudyOutcome(text, failures)


def _require_sense(plan: StudyPlan) -> None:
    """Refuse what no row could be run with."""
    taken = [name for name in plan.settings if name in _OWN_SETTINGS]
    if taken:
        raise ConfigError(f"a study decides {', '.join(taken)} itself; see its options")
    if plan.presence not in PROTOCOLS or not plan.seeds:
        raise ConfigError(f"a study needs seeds and the presence 'all' or 'oracle', not '{plan.presence}'")
    if len(plan.datalists) > 1 and not plan.table.several_sets:
        raise ConfigError(f"{plan.table.name} is of one data set; give its datalist without --sets")


class _Study:
    """The runs of a plan."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
        self.weights = yaml.safe_load((CONFIGS / "weights.yaml").read_text(encoding="utf-8"))
        self.starts: dict[str, Path] = {}
        self.digests: dict[Path, str] = {}
        self.tolerances: set[str] = set()

    def reason_not_to_run(self, row: StudyRow) -> str | None:
        """Say why a row cannot be run at all; None where it can."""
        if row.missing is not None:
            return row.missing
        if BOXES in row.settings and self.plan.presence != "oracle":
            return 'boxes of the truth can be asked for in the protocol "oracle" alone'
        if row.weights is not None and not self._published(row.weights).is_file():
            return f"no weights: models/{self._published(row.weights).name} is not there, see configs/weights.yaml"
        unknown = [name for name in (row.trained_on, row.tested_on) if name and name not in self.plan.datalists]
        if unknown:
            return f"no data: {' and '.join(dict.fromkeys(unknown))} not given with --sets NAME=DATALIST"
        if row.trained_on != row.tested_on and not self._class_ids(row.trained_on) & self._class_ids(row.tested_on):
            return f"no class in common: {row.trained_on} and {row.tested_on} annotate others"
        return None

    def run(self, row: StudyRow) -> str | None:
        """Train and evaluate with every seed; give the reason where that failed."""
        from scripts.engines.evaluators import intended_error

        for seed in self.plan.seeds:
            try:
                checkpoint = self._train(row, seed)
                for noise_seed in (None, *self.plan.noise_seeds):
                    self._evaluate(row, seed, noise_seed, checkpoint)
            except Exception as error:  # MONAI wraps what the bundle raises
                reason = intended_error(error)
                if reason is None:
                    raise
                return " ".join(str(reason).split())
        return None

    def outcome(self, row: StudyRow, failure: str | None) -> RowOutcome:
        """Collect what a row has come to, in this run or before."""
        reason = self.reason_not_to_run(row)
        scores = None if reason is not None else self._scores(row)
        note = "" if scores is not None else reason or "not run"
        reference = self._reference(row)
        return RowOutcome(
            name=row.name,
            scores=scores,
            note=f"failed: {failure}" if failure is not None else note,
            paper=row.paper,
            comparable=row.comparable,
            reference=None if reference is None else reference.name,
        )

    def caption(self) -> list[str]:
        """State what the figures are of."""
        protocol = {
            "all": 'Protocol "all": every class was asked for on every slice.',
            "oracle": 'Protocol "oracle": a class was asked for only on the slices whose truth contains it.',
        }[self.plan.presence]
        paper = f" The paper: {self.plan.table.data}." if self.plan.table.data else ""
        shared = ", ".join(f"{name} {value}" for name, value in _decisive(self.plan.settings).items())
        return [
            f"Percent. Data: {', '.join(self.plan.datalists)}, section {self.plan.section}.{paper} {protocol}",
            "DSC and NSD: mean over a class's cases, a case's slices pooled, then unweighted over the classes, and "
            "over the seeds (± their standard deviation, where there are several). In brackets 95 % bootstrap "
            "intervals, patients resampled. DSC less reference: over the cases and classes that both have; p: "
            f"Wilcoxon's signed-rank test over patients. Reference: {self.plan.table.reference}.",
            f"NSD at {' and '.join(sorted(self.tolerances)) or 'no tolerance yet'}. NSD challenge: as the MedSAM "
            f"challenge's script computes it. All rows: {shared or 'the settings of configs/train.json'}.",
        ]

    # ------------------------------------------------------------------------------------------------------- running

    def _train(self, row: StudyRow, seed: int) -> Path:
        """Train a row, unless that is done; give its checkpoint."""
        from scripts import cli

        folder, settings = self._training_folder(row, seed), self._training_settings(row)
        fingerprint = self._training_fingerprint(row, seed)
        if not _is_complete(folder, fingerprint):
            start = time.monotonic()
            _require_new_run(folder)
            if row.weights is None:
                presence = self.plan.presence  # the best epoch is chosen by the protocol of the evaluation
                cli.train(self._datalist(row.trained_on), output=str(folder), seed=seed, presence=presence, **settings)
            else:
                self._build_published(row, folder)
            _mark_complete(folder, fingerprint, seconds=time.monotonic() - start)
        return folder / "model.pt"

    def _evaluate(self, row: StudyRow, seed: int, noise_seed: int | None, checkpoint: Path) -> None:
        """Evaluate a row's network, unless that is done."""
        from scripts import cli
        from scripts.networks.model_card import ModelCard

        folder = self._evaluation_folder(row, seed, noise_seed)
        fingerprint = self._evaluation_fingerprint(row, seed, noise_seed)
        if _is_complete(folder, fingerprint):
            return
        start = time.monotonic()
        _require_new_run(folder)
        settings = {**self._training_settings(row), **row.evaluation, "noise_seed": noise_seed}
        of_card = ModelCard.beside(checkpoint).network
        cli.evaluate(
            self._datalist(row.tested_on),
            checkpoint=str(checkpoint),
            section=self.plan.section,
            presence=self.plan.presence,
            output=str(folder),
            **{name: value for name, value in settings.items() if name not in {"pretrained", *of_card}},
        )
        _mark_complete(folder, fingerprint, seconds=time.monotonic() - start)

    def _build_published(self, row: StudyRow, folder: Path) -> None:
        """Make a model and its card of a published file, for the classes of the data."""
        from scripts.networks.automedsam import AutoMedSAM
        from scripts.networks.checkpoints import load_weights, save_state_dict
        from scripts.networks.model_card import ModelCard

        entry = self.weights[str(row.weights)]
        network = AutoMedSAM(
            image_encoder=entry["encoder"],
            pixel_normalisation=entry["pixels"],
            class_ids=sorted(self._class_ids(row.tested_on)),
        )
        load_weights(network, self._published(str(row.weights)))
        folder.mkdir(parents=True, exist_ok=True)
        save_state_dict(network.state_dict(), folder / "model.pt")
        ModelCard(network=network.settings, preprocessing={}, trained={}).write(folder / "model.json")

    def _published(self, name: str) -> Path:
        """Say where a published file is expected."""
        return BUNDLE_ROOT / "models" / self.weights[name]["file"]

    def _training_settings(self, row: StudyRow) -> dict[str, Any]:
        """Give all settings of a row's training, the common start and the common store among them."""
        merged = {**self.plan.settings, **row.settings}
        settings = {name: as_setting(value, None) for name, value in merged.items()}
        start = settings.get("pretrained", str(BUNDLE_ROOT / "models" / "model.pt"))
        settings["pretrained"] = str(self._published(row.weights)) if row.weights else self._start(start)
        if settings["pretrained"] is not None and not settings.get("train_image_encoder", False):
            settings.setdefault("embeddings_dir", str(self.plan.output / "embeddings"))
        return settings

    def _start(self, pretrained: str | None) -> str | None:
        """Give the weights that all rows start from: without a class prompt encoder, which each row learns anew."""
        from scripts.networks.checkpoints import read_state_dict, save_state_dict

        if pretrained is None:
            return None
        source = _resolved(pretrained)
        if source not in self.starts:
            state = read_state_dict(source)
            kept = {name: value for name, value in state.items() if not name.startswith(CLASS_PROMPT_PREFIX)}
            self.starts[source] = Path(source)
            if len(kept) < len(state):
                self.starts[source] = self.plan.output / f"start_{self._digest_of_file(Path(source))[:12]}.pt"
                save_state_dict(kept, self.starts[source])
        return str(self.starts[source])

    # ------------------------------------------------------------------------------------------------------- folders

    def _training_folder(self, row: StudyRow, seed: int) -> Path:
        """Name the folder after the first row with the same training, which the others share."""
        own = (row.settings, row.trained_on, row.weights)
        rows = [other for other in self.plan.table.rows if other.missing is None]
        first = next(other for other in rows if (other.settings, other.trained_on, other.weights) == own)
        return self.plan.output / _slug(first.name) / f"seed_{seed}"

    def _evaluation_folder(self, row: StudyRow, seed: int, noise_seed: int | None) -> Path:
        """Name the folder of an evaluation."""
        name = "evaluation" if noise_seed is None else f"evaluation_noise_{noise_seed}"
        return self.plan.output / _slug(row.name) / f"seed_{seed}" / name

    def _training_fingerprint(self, row: StudyRow, seed: int) -> str:
        """Tell trainings apart by what decides their figures."""
        settings = self._training_settings(row)
        start = settings.pop("pretrained")
        return _digest(
            {
                "settings": _decisive(settings),
                "stored": bool(settings.get("embeddings_dir")),
                "start": None if start is None else self._digest_of_file(Path(start)),
                "data": self._digest_of_data(row.trained_on),
                "presence": self.plan.presence,
                "seed": seed,
            }
        )

    def _evaluation_fingerprint(self, row: StudyRow, seed: int, noise_seed: int | None) -> str:
        """Tell evaluations apart by what decides their figures."""
        return _digest(
            {
                "training": self._training_fingerprint(row, seed),
                "settings": _decisive(row.evaluation),
                "data": self._digest_of_data(row.tested_on),
                "section": self.plan.section,
                "presence": self.plan.presence,
                "noise_seed": noise_seed,
            }
        )

    def _datalist(self, name: str | None) -> Any:
        """Give a data set's datalist; without a name that of the only one."""
        return self.plan.datalists[name if name is not None else next(iter(self.plan.datalists))]

    def _digest_of_data(self, name: str | None) -> list[str]:
        return [self._digest_of_file(Path(path)) for path in _paths(self._datalist(name))]

    def _digest_of_file(self, path: Path) -> str:
        """Hash a file's bytes, once in a study."""
        if path not in self.digests:
            self.digests[path] = _digest_of_file(path)
        return self.digests[path]

    def _class_ids(self, name: str | None) -> set[int]:
        """Find the classes that the training cases of a data set teach."""
        return {class_id for case in self._cases(name, "training") for class_id in case["annotated"]}

    def _cases(self, name: str | None, section: str) -> list[dict[str, Any]]:
        """Read a section of a data set."""
        datalist = self._datalist(name)
        folder = Path(_paths(datalist)[0]).absolute().parent
        return read_datalist(datalist, section=section, vocabulary=self.vocabulary, dataset_dir=folder)

    # ------------------------------------------------------------------------------------------------------- figures

    def _scores(self, row: StudyRow, *, compare: bool = True) -> Scores | None:
        """Score a row over the seeds that are complete; None where none is."""
        tables = self._tables(row)
        if not tables:
            return None
        dsc, nsd = (_mean_table(tables, measure) for measure in ("dsc", "nsd"))
        order = _patients(tables[0], dsc.cases)
        self.tolerances |= {f"{score.tolerance:g} {score.unit}" for score in tables[0]}
        each, mean = class_intervals(dsc.values, patients=order)
        _, surface = class_intervals(nsd.values, patients=order)
        scores = Scores(
            seeds=len(tables),
            dsc=mean,
            nsd=surface,
            nsd_challenge=_mean_of_classes(_mean_table(tables, "nsd_challenge").values),
            classes={name: entry.mean for name, entry in zip(dsc.classes, each, strict=True)},
            seed_deviation=_deviation([_mean_of_classes(_table(scores, "dsc").values) for scores in tables]),
            noise_deviation=self._noise_deviation(row),
            training_seconds=self._training_seconds(row),
        )
        reference = self._reference(row) if compare else None
        return scores if reference is None else self._compared(scores, dsc, reference, order)

    def _compared(self, scores: Scores, dsc: "_ScoreTable", reference: StudyRow, patients: Sequence[str]) -> Scores:
        """Add the difference to the reference, over the cases and classes that both have."""
        tables = self._tables(reference)
        if not tables:
            return scores
        other = _mean_table(tables, "dsc")
        shared = [name for name in dsc.classes if name in other.classes]
        if other.cases != dsc.cases or not shared:
            return scores
        _, difference = compare_runs(other.of(shared), dsc.of(shared), patients=patients)
        return replace(scores, difference=difference)

    def _reference(self, row: StudyRow) -> StudyRow | None:
        """Find the row to compare with: of the same test data, the table's own or the first; None for itself."""
        alike = [other for other in self.plan.table.rows if other.tested_on == row.tested_on]
        named = [other for other in alike if other.name.startswith(self.plan.table.reference)]
        named += [other for other in alike if other.missing is None and other.trained_on == row.tested_on is not None]
        runnable = [other for other in alike if self.reason_not_to_run(other) is None]
        reference = (named or runnable or alike)[0]
        return None if reference.name == row.name else reference

    def _tables(self, row: StudyRow) -> list[list[ClassScore]]:
        """Read the complete evaluations of a row without noise, one for each seed."""
        found = [self._read(row, seed, None) for seed in self.plan.seeds]
        return [scores for scores in found if scores is not None]

    def _read(self, row: StudyRow, seed: int, noise_seed: int | None) -> list[ClassScore] | None:
        """Read an evaluation, if it is complete and of these settings."""
        folder = self._evaluation_folder(row, seed, noise_seed)
        if self.reason_not_to_run(row) is not None or not (folder / MARKER).is_file():
            return None
        if not _is_complete(folder, self._evaluation_fingerprint(row, seed, noise_seed)):
            return None
        return read_scores_csv(folder / "metrics.csv")

    def _training_seconds(self, row: StudyRow) -> float:
        """Give how long a training took, on average over the seeds that are complete."""
        read = [_read_marker(self._training_folder(row, seed)).get("seconds") for seed in self.plan.seeds]
        known = [float(seconds) for seconds in read if seconds is not None]
        return statistics.fmean(known) if known else math.nan

    def _noise_deviation(self, row: StudyRow) -> float:
        """Give the deviation over draws of noise with the same weights, root mean square over the trainings."""
        deviations = []
        for seed in self.plan.seeds:
            drawn = [self._read(row, seed, noise_seed) for noise_seed in self.plan.noise_seeds]
            means = [_mean_of_classes(_table(scores, "dsc").values) for scores in drawn if scores is not None]
            deviations.append(_deviation(means))
        known = [value**2 for value in deviations if not math.isnan(value)]
        return math.sqrt(statistics.fmean(known)) if known else math.nan


@dataclass(frozen=True)
class _ScoreTable:
    """One measure of one evaluation, or its mean over several.

    Attributes:
        cases: names, sorted.
        classes: names, in the order of their ids.
        values: `(cases, K)`, NaN where a case lacks a class.
    """

    cases: list[str]
    classes: list[str]
    values: Values

    def of(self, classes: Sequence[str]) -> Values:
        """Give some classes' columns."""
        return self.values[:, [self.classes.index(name) for name in classes]]


def _table(scores: Sequence[ClassScore], measure: str) -> _ScoreTable:
    """Lay an evaluation's scores out by case and class."""
    cases = sorted({score.case for score in scores})
    names = {score.class_id: score.class_name for score in sorted(scores, key=lambda score: score.class_id)}
    classes = list(names.values())
    values = np.full((len(cases), len(classes)), np.nan)
    for score in scores:
        values[cases.index(score.case), classes.index(score.class_name)] = getattr(score, measure, math.nan)
    return _ScoreTable(cases, classes, values)


def _patients(scores: Sequence[ClassScore], cases: Sequence[str]) -> list[str]:
    """Give the patient of each case."""
    known = {score.case: score.patient for score in scores}
    return [known[case] for case in cases]


def _mean_table(evaluations: Sequence[Sequence[ClassScore]], measure: str) -> _ScoreTable:
    """Average over evaluations of the same cases and classes."""
    tables = [_table(scores, measure) for scores in evaluations]
    if any((table.cases, table.classes) != (tables[0].cases, tables[0].classes) for table in tables):
        raise InputError("the seeds of a row were evaluated on different cases; remove its folder and run it again")
    return replace(tables[0], values=np.mean([table.values for table in tables], axis=0))


def _mean_of_classes(values: Values) -> float:
    """Average over cases, then over the classes that occur; NaN where none does."""
    known = [column[~np.isnan(column)] for column in values.T]
    means = [column.mean() for column in known if column.size]
    return float(np.mean(means)) if means else math.nan


def _deviation(values: Sequence[float]) -> float:
    """Give the standard deviation; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _slug(name: str) -> str:
    """Make a folder's name of a row's."""
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_")


def _paths(datalist: Any) -> list[str]:
    """Give a datalist's file, or several datalists' files."""
    return [datalist] if isinstance(datalist, str) else list(datalist)


def _resolved(text: str) -> str:
    """Evaluate a path that a config gives as an expression over `bundle_root`."""
    from monai.bundle import ConfigParser

    parser = ConfigParser({"bundle_root": str(BUNDLE_ROOT), "path": text})
    return str(Path(parser.get_parsed_content("path")).absolute())


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what changes no figure."""
    return {name: value for name, value in settings.items() if name not in _NEUTRAL_SETTINGS}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    """Hash a file's bytes.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path") from error


def _is_complete(folder: Path, fingerprint: str) -> bool:
    """Say whether a run was finished with just these settings."""
    return _read_marker(folder).get("fingerprint") == fingerprint


def _read_marker(folder: Path) -> dict[str, Any]:
    """Read what was written down of a finished run; nothing where there is no marker or a damaged one."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_new_run(folder: Path) -> None:
    """Take the marker away before anything is written, so that a run which breaks off is not complete."""
    (folder / MARKER).unlink(missing_ok=True)


def _mark_complete(folder: Path, fingerprint: str, *, seconds: float) -> None:
    """Write down that a run was finished, and with what."""
    with atomic_path(folder / MARKER) as temporary:
        temporary.write_text(json.dumps({"fingerprint": fingerprint, "seconds": round(seconds, 1)}, indent=2) + "\n")
