"""What a study runs: its plan, and for each row the settings, the start, the folders and the fingerprints."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from scripts.data.datalist import read_datalist
from scripts.data.vocabulary import Vocabulary
from scripts.errors import ConfigError, InputError
from scripts.study.completion import FileDigests, digest
from scripts.study.rows import StudyRow, StudyTable
from scripts.study.starts import StartFiles
from scripts.workflow import BUNDLE_ROOT, CONFIGS, as_setting, find_overlays

TABLES = CONFIGS / "experiments" / "tables"
BOXES = "validate#evaluator#prepare_batch#boxes"
# The study says itself where data are and results go, and which protocol and seed a run has.
OWN_SETTINGS = (
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
        overlays: over `configs/train.json`, for all rows; those of a row lie over them, and `settings` over both.
        seeds: of the trainings.
        noise_seeds: of the network's own noise at evaluation; empty for an evaluation without noise alone.
        section: which cases are evaluated, of rows that do not say so themselves.
        presence: the protocol, `all` or `oracle`.
        only: names of the rows to run; None for all.
    """

    table: StudyTable
    datalists: Mapping[str, Any]
    output: Path
    settings: Mapping[str, Any]
    overlays: Sequence[Path] = ()
    seeds: Sequence[int] = (0,)
    noise_seeds: Sequence[int] = ()
    section: str = "test"
    presence: str = "all"
    only: Sequence[str] | None = None


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
    return {name: value for name, value in settings.items() if name not in (*OWN_SETTINGS, "class_ids")}


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what changes no figure."""
    return {name: value for name, value in settings.items() if name not in _NEUTRAL_SETTINGS}


class PlannedRows:
    """The rows of a plan as runs: with which settings, from which start, into which folders.

    Args:
        plan: of the study.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
        self.weights = yaml.safe_load((CONFIGS / "weights.yaml").read_text(encoding="utf-8"))
        self.digests = FileDigests()
        self.starts = StartFiles(plan.output, self.digests)
        self._class_ids: dict[tuple[str | None, str], set[int]] = {}

    def reason_not_to_run(self, row: StudyRow) -> str | None:
        """Say why a row cannot be run at all; None where it can."""
        if row.missing is not None:
            return row.missing
        if BOXES in row.settings and self.plan.presence != "oracle":
            return 'boxes of the truth can be asked for in the protocol "oracle" alone'
        if row.weights is not None and not self.published(row.weights).is_file():
            return f"no weights: models/{self.published(row.weights).name} is not there, see configs/weights.yaml"
        unknown = [name for name in (row.trained_on, row.tested_on) if name and name not in self.plan.datalists]
        if unknown:
            return f"no data: {' and '.join(dict.fromkeys(unknown))} not given with --sets NAME=DATALIST"
        return None if row.trained_on == row.tested_on else self._reason_not_to_cross(row)

    def section(self, row: StudyRow) -> str:
        """Give the section that a row is evaluated on."""
        return row.section or self.plan.section

    def datalist(self, name: str | None) -> Any:
        """Give a data set's datalist; without a name that of the only one."""
        return self.plan.datalists[name if name is not None else next(iter(self.plan.datalists))]

    def published(self, name: str) -> Path:
        """Say where a published file is expected."""
        return BUNDLE_ROOT / "models" / self.weights[name]["file"]

    def class_ids(self, name: str | None, section: str = "training") -> set[int]:
        """Find the classes that a section of a data set annotates.

        Raises:
            InputError: the datalist is none, or has no such section.
        """
        if (name, section) not in self._class_ids:
            datalist = self.datalist(name)
            folder = Path(_paths(datalist)[0]).absolute().parent
            cases = read_datalist(datalist, section=section, vocabulary=self.vocabulary, dataset_dir=folder)
            self._class_ids[name, section] = {class_id for case in cases for class_id in case["annotated"]}
        return self._class_ids[name, section]

    # ------------------------------------------------------------------------------------------------------ settings

    def overlays(self, row: StudyRow) -> list[Path]:
        """Give the overlays of a row's configs, those of the whole study first.

        Raises:
            ConfigError: there is none of such a name.
        """
        return [*self.plan.overlays, *find_overlays(row.overlays)]

    def settings(self, row: StudyRow, seed: int) -> dict[str, Any]:
        """Give all settings of a row's training, the common start and the common store among them."""
        settings = self._merged(row)
        settings["pretrained"] = str(self.published(row.weights)) if row.weights else self._start(settings, seed)
        if self._architecture(settings) != "automedsam":
            # Its prompts and updates lie inside the image encoder: there is nothing to store.
            settings["embeddings_dir"] = None
            if self._others_are_stored:
                settings.setdefault("augment", bool(settings.get("augmented_versions")))
        elif self._is_stored(settings):
            settings.setdefault("embeddings_dir", str(self.plan.output / "embeddings"))
        return settings

    def common(self) -> dict[str, Any]:
        """Give the settings that all rows share: the table's, as overlays of the whole study have them."""
        of_overlays = read_overlays(self.plan.overlays)
        return {name: of_overlays.get(name, value) for name, value in self.plan.table.common.items()}

    def _merged(self, row: StudyRow) -> dict[str, Any]:
        """Lay a row's settings over those of the study and its overlays."""
        content = read_overlays(self.overlays(row))
        before = {**self._shipped, **content}
        common = {name: value for name, value in self.common().items() if before.get(name) != value}
        of_study = {name: value for name, value in self.plan.settings.items() if self._has(name, content)}
        merged = {**content, **common, **of_study, **row.settings}
        return {name: as_setting(value, _text(before.get(name))) for name, value in merged.items()}

    def _has(self, name: str, content: Mapping[str, Any]) -> bool:
        """Say whether a row has a setting: no if only the overlays of other rows bring it, as those of another network.

        What no row has stays, to be refused by the training.
        """
        part = _part(name)
        return part in self._shipped or part in map(_part, content) or part not in self._parts_of_overlays

    def _architecture(self, settings: Mapping[str, Any]) -> str:
        """Say which network some settings build."""
        return str(settings.get("architecture", self._shipped["architecture"]))

    def _is_stored(self, settings: Mapping[str, Any]) -> bool:
        """Say whether an AutoMedSAM's image encoder is frozen, so that its answers are stored unless told otherwise."""
        if settings.get("train_image_encoder", False) or settings.get("embeddings_dir", "") is None:
            return False
        return settings.get("pretrained", self._shipped["pretrained"]) is not None

    def _start(self, settings: Mapping[str, Any], seed: int) -> str | None:
        """Give the weights that a row starts from; None for random ones of its own."""
        pretrained = settings.get("pretrained", self._shipped["pretrained"])
        if pretrained is not None:
            return str(self.starts.trained(pretrained))
        # An encoder that is to be frozen needs trained weights: without them the training refuses to start.
        if not settings.get("train_image_encoder", False) or not any(row.overlays for row in self._able):
            return None
        encoder, size = (settings.get(name, self._shipped[name]) for name in ("image_encoder", "image_size"))
        return str(self.starts.seeded(encoder, size, seed))

    @property
    def _able(self) -> list[StudyRow]:
        """The rows that the bundle has a network for."""
        return [row for row in self.plan.table.rows if row.missing is None]

    @cached_property
    def _shipped(self) -> dict[str, Any]:
        """The settings of `configs/train.json`."""
        from monai.bundle import ConfigParser

        return ConfigParser.load_config_file(str(CONFIGS / "train.json"))

    @cached_property
    def _parts_of_overlays(self) -> set[str]:
        """What the overlays of any row set."""
        return {_part(name) for row in self._able for name in read_overlays(self.overlays(row))}

    @cached_property
    def _others_are_stored(self) -> bool:
        """Whether the table has an AutoMedSAM whose slices are stored, and so not augmented anew each time."""
        merged = [self._merged(row) for row in self._able if row.weights is None]
        return any(self._architecture(settings) == "automedsam" and self._is_stored(settings) for settings in merged)

    # ----------------------------------------------------------------------------------------- folders, fingerprints

    def training_folder(self, row: StudyRow, seed: int) -> Path:
        """Name the folder after the first row with the same training, which the others share."""
        first = next(other for other in self._able if _training(other) == _training(row))
        return self.plan.output / _slug(first.name) / f"seed_{seed}"

    def evaluation_folder(self, row: StudyRow, seed: int, noise_seed: int | None) -> Path:
        """Name the folder of an evaluation."""
        name = "evaluation" if noise_seed is None else f"evaluation_noise_{noise_seed}"
        return self.plan.output / _slug(row.name) / f"seed_{seed}" / name

    def training_fingerprint(self, row: StudyRow, seed: int) -> str:
        """Tell trainings apart by what decides their figures."""
        settings = self.settings(row, seed)
        start = settings.pop("pretrained")
        return digest(
            {
                "settings": decisive(settings),
                "stored": bool(settings.get("embeddings_dir")),
                "start": None if start is None else self.digests.of(Path(start)),
                "data": self._digests_of_data(row.trained_on),
                "presence": self.plan.presence,
                "seed": seed,
            }
        )

    def evaluation_fingerprint(self, row: StudyRow, seed: int, noise_seed: int | None) -> str:
        """Tell evaluations apart by what decides their figures."""
        return digest(
            {
                "training": self.training_fingerprint(row, seed),
                "settings": decisive(row.evaluation),
                "data": self._digests_of_data(row.tested_on),
                "section": self.section(row),
                "presence": self.plan.presence,
                "noise_seed": noise_seed,
            }
        )

    def _digests_of_data(self, name: str | None) -> list[str]:
        return [self.digests.of(Path(path)) for path in _paths(self.datalist(name))]

    # ---------------------------------------------------------------------------------------------------- comparisons

    def reference(self, row: StudyRow) -> StudyRow | None:
        """Find the row to compare with: of the same test data, the table's own or the first; None for itself."""
        place = (row.tested_on, row.section)
        alike = [other for other in self.plan.table.rows if (other.tested_on, other.section) == place]
        named = [other for other in alike if other.name.startswith(self.plan.table.reference)]
        named += [other for other in alike if other.missing is None and other.trained_on == row.tested_on is not None]
        runnable = [other for other in alike if self.reason_not_to_run(other) is None]
        reference = (named or runnable or alike)[0]
        return None if reference.name == row.name else reference

    def _reason_not_to_cross(self, row: StudyRow) -> str | None:
        """Say why a network cannot be tested on another set than it was trained on; None where it can."""
        try:
            shared = self.class_ids(row.trained_on) & self.class_ids(row.tested_on, self.section(row))
        except InputError as error:
            return f"no data: {' '.join(str(error).split())}"
        return None if shared else f"no class in common: {row.trained_on} and {row.tested_on} annotate others"


def _training(row: StudyRow) -> tuple[Any, ...]:
    """Give what two rows must share to share a training."""
    return row.overlays, row.settings, row.trained_on, row.weights


def _text(default: Any) -> str | None:
    """Give a default that is a text, beside which `none` may be a text too."""
    return default if isinstance(default, str) else None


def _part(setting: str) -> str:
    """Give the part of a config that a setting belongs to."""
    return setting.split("#")[0].split("::")[0]


def _slug(name: str) -> str:
    """Make a folder's name of a row's."""
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_")


def _paths(datalist: Any) -> list[str]:
    """Give a datalist's file, or several datalists' files."""
    return [datalist] if isinstance(datalist, str) else list(datalist)
