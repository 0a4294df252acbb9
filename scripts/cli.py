"""The command line: every verb calls a config or a function of the bundle and says in one line what went wrong."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fire
from tqdm import tqdm

from scripts.command_words import for_fire, later, perform
from scripts.errors import CheckpointError, ConfigError, InputError, PromptError, TrainingError
from scripts.workflow import BUNDLE_ROOT, CONFIGS, NETWORK_OVERLAYS, as_setting, find_overlays, run_configs

if TYPE_CHECKING:
    from scripts.data.prompts import Prompts

SHIPPED_MODEL = BUNDLE_ROOT / "models" / "model.pt"
INTERRUPTED = 130  # the shell's exit code for Ctrl-C
STATS_LOGGER = "monai.handlers.StatsHandler"


def infer(
    source: str,
    *,
    classes: str | Sequence[str | int] | None = None,
    boxes: Any = None,
    points: Any = None,
    prompts: str | None = None,
    modality: str | None = None,
    output: str = "out",
    checkpoint: str | None = None,
    network: str | None = None,
    config: str | Sequence[str] = (),
    probability_maps: bool = False,
    samples: int = 1,
    runtime: str = "torch",
    force: bool = False,
    **overrides: Any,
) -> str:
    """Segment a file or a folder: NIfTI and other volumes, DICOM series, PNG, JPG and TIFF images.

    Args:
        source: the file or folder.
        classes: names or ids, separated by commas; all that were trained for the modality if nothing is asked for.
        boxes: of one image, x_min, y_min, x_max, y_max each, as [[30,40,90,110]], or with z in a volume, see
            docs/prompts.md.
        points: of one image, as [[52,61]] for points in one object, see docs/prompts.md.
        prompts: JSON file with classes, boxes and points, in place of the three.
        modality: CT, MR, endoscopy, dermoscopy, xray, fundus, ultrasound or microscopy, where the file does not tell.
        output: folder of label maps, names, colours and overlay pictures.
        checkpoint: a trained model.pt with its model.json; the bundle's own if none is given.
        network: automedsam or hsp_sam, for the checkpoint to be compared with; the checkpoint knows it by itself.
        config: overlays over configs/inference.json, separated by commas; networks/medsam_vit_b tells how a published
            weights file is built, which has no card beside it and is asked by boxes and points.
        probability_maps: also write each class's probabilities, in which overlapping classes stay apart.
        samples: how often to draw the diffusion noise; of several draws the mean decides, and their spread is written
            as a map of uncertainty for each class.
        runtime: torch, or onnx for ONNX Runtime on a CPU.
        force: accept what the model was not trained for: classes in this modality, boxes and points.
        overrides: further settings of configs/inference.json.
    """
    overlays = find_overlays(config)
    model = _of_published(checkpoint) if overlays and checkpoint else _of_checkpoint(checkpoint, with_trained=True)
    _require_network(network, model["architecture"], checkpoint)
    asked = _read_prompts(prompts, classes=classes, boxes=boxes, points=points)
    _require_sense(asked, modality, trained=model["trained"], force=force)
    folder = _writable(output)
    settings = {
        "dataset_dir": str(Path(source).absolute()),
        **asked.model_dump(),
        "modality": modality,
        "output_dir": str(folder),
        "probability_maps": probability_maps,
        "samples": samples,
        "runtime": runtime,
        "force": force,
    }
    if samples > 1:
        settings["noise_seed"] = 0
    run_configs(
        ["inference.json", *NETWORK_OVERLAYS[model["architecture"]], *overlays], {**settings, **model, **overrides}
    )
    written = "DICOM Segmentation objects" if overrides.get("output_format") == "dicom-seg" else "label maps, names"
    return f"{written} and pictures are in {folder}"


def train(
    datalist: str | Sequence[str],
    *,
    output: str = "runs/train",
    config: str | Sequence[str] = (),
    from_scratch: bool = False,
    resume: str | None = None,
    **overrides: Any,
) -> str:
    """Train AutoMedSAM, or with --config networks/hsp_sam.yaml HSP-SAM, on the cases of a datalist.

    Args:
        datalist: JSON file with the sections training and validation, see docs/data.md; several, separated by commas,
            are trained as one model.
        output: folder of model.pt, model.json, last.pt, losses.csv and epochs.csv.
        config: overlays over configs/train.json, separated by commas; names within configs/ will do.
        from_scratch: start from random weights and train the image encoder too.
        resume: the last.pt of a run to go on with.
        overrides: further settings of configs/train.json, such as max_epochs.
    """
    folder = _writable(output)
    settings: dict[str, Any] = {
        **_of_datalist(datalist),
        "output_dir": str(folder),
        "resume": None if resume is None else str(Path(resume).absolute()),
    }
    if from_scratch:
        settings |= {"pretrained": None, "train_image_encoder": True}
    if "class_ids" not in overrides:
        settings["class_ids"] = _annotated_ids(settings["datalist"], {**settings, **overrides}["dataset_dir"])
    run_configs(["train.json", *find_overlays(config)], {**settings, **overrides})
    return f"the best network is {folder / 'model.pt'}; its way there is in epochs.csv and losses.csv"


def embed(
    datalist: str | Sequence[str],
    *,
    checkpoint: str | None = None,
    embeddings: str = "runs/embeddings",
    config: str | Sequence[str] = (),
    **overrides: Any,
) -> str:
    """Store what the frozen image encoder says of the slices for training and validation, so that no run asks it again.

    Args:
        datalist: JSON file with the sections training and validation, or several, separated by commas.
        checkpoint: a model.pt with its model.json, or a published weights file of the network in `config`; the bundle's
            own model if none is given.
        embeddings: folder of the store; give it to train and evaluate as --embeddings_dir.
        config: overlays over configs/train.json, separated by commas.
        overrides: further settings of configs/train.json, such as augmented_versions.
    """
    settings = {**_of_datalist(datalist), "embeddings_dir": str(_writable(embeddings))}
    settings |= {"pretrained": str(SHIPPED_MODEL if checkpoint is None else Path(checkpoint).absolute())}
    if "class_ids" not in overrides:
        settings["class_ids"] = _annotated_ids(settings["datalist"], {**settings, **overrides}["dataset_dir"])
    workflow = run_configs(["train.json", *find_overlays(config), "embed.yaml"], {**settings, **overrides})
    stored = workflow.parser.get_parsed_content("train#dataset").embeddings
    return f"the embeddings are in {stored.store.folder}; train with --embeddings_dir {settings['embeddings_dir']}"


def evaluate(
    datalist: str | Sequence[str],
    *,
    checkpoint: str | None = None,
    section: str = "test",
    presence: str = "all",
    output: str = "runs/evaluate",
    **overrides: Any,
) -> str:
    """Score a model on a section of a datalist: each class in the cases' own spacing, see docs/evaluation.md.

    Args:
        datalist: JSON file, see docs/data.md, or several, separated by commas.
        checkpoint: a trained model.pt with its model.json; the bundle's own if none is given.
        section: which cases.
        presence: `all` asks for every class in every slice, `oracle` only for those that the truth has there.
        output: folder of metrics.csv, summary.json and run.json.
        overrides: further settings of configs/train.json and configs/evaluate.json.
    """
    folder = _writable(output)
    settings = {
        **_of_datalist(datalist),
        "validation_section": section,
        "presence": presence,
        "output_dir": str(folder),
    }
    model = _of_checkpoint(checkpoint)
    configs = ["train.json", "evaluate.json", *NETWORK_OVERLAYS[model["architecture"]]]
    workflow = run_configs(configs, {**settings, **model, **overrides})
    from scripts.report.tables import render_tables

    summaries = workflow.parser.get_parsed_content("validate#scores").summaries()
    tables = render_tables(summaries, averaging=workflow.parser.get_parsed_content("averaging"))
    return f"{tables}\nevery case's scores are in {folder / 'metrics.csv'}"


def score(
    *,
    predictions: str,
    truth: str,
    output: str = "runs/score",
    labels: str | None = None,
    tolerance: float = 2.0,
    patients: str | None = None,
    presence: str = "all",
    averaging: str = "case",
    pooled_batch: int = 40,
    progress_bar: bool = True,
) -> str:
    """Score label maps that any program made, against the truth: the scores of `evaluate`, see docs/evaluation.md.

    Args:
        predictions: folder of label maps (NIfTI, PNG and others), named after their cases, with or without _seg.
        truth: folder of the true label maps.
        output: folder of metrics.csv, summary.json and run.json.
        labels: JSON file of names by value; labels.json among the predictions if none is given.
        tolerance: of the NSD, in mm for volumes and in pixels for pictures.
        patients: CSV file with the columns case and patient.
        presence: all or oracle: how the classes were asked for when the predictions were made.
        averaging: of the DSC in the printed table: case, slice, dataset or batch-pooled.
        pooled_batch: cases in a batch of the batch-pooled scores.
        progress_bar: whether to show one.
    """
    from scripts.data.vocabulary import Vocabulary
    from scripts.scoring_files import Request, score_folders

    request = Request(
        predictions=Path(predictions).absolute(),
        truth=Path(truth).absolute(),
        labels=None if labels is None else Path(labels).absolute(),
        patients=None if patients is None else Path(patients).absolute(),
        tolerance=tolerance,
        protocol=presence,
        averaging=averaging,
        pooled_batch=pooled_batch,
    )
    folder = _writable(output)
    vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
    scored, tables = score_folders(request, folder, vocabulary=vocabulary, progress=as_setting(progress_bar, True))
    if scored.failures:
        sys.stdout.write(f"{tables}\n")
        scored.raise_failures()
    return f"{tables}\nevery case's scores are in {folder / 'metrics.csv'}"


def compare(first: str, second: str, *, output: str = "runs/compare", common: bool = False) -> str:
    """Compare two runs over the same cases: the second less the first, with interval, p-value and verdict.

    Args:
        first: folder that evaluate or score wrote.
        second: the same of the other run.
        output: folder of comparison.json.
        common: leave out what only one of them has scored, instead of stopping.
    """
    from scripts.report.comparison import compare_folders

    folder = _writable(output)
    tables = compare_folders(Path(first).absolute(), Path(second).absolute(), folder, common=as_setting(common, False))
    return f"{tables}\nthe figures are in {folder / 'comparison.json'}"


def phantoms(
    output: str,
    *,
    training: int = 24,
    validation: int = 4,
    test: int = 6,
    size: int = 128,
    slices: int = 24,
    seed: int = 0,
) -> str:
    """Write abdominal CT phantoms with their labels and datalist.

    Args:
        output: the folder.
        training: number of training volumes.
        validation: number of validation volumes.
        test: number of test volumes.
        size: pixels of a slice, each way.
        slices: slices of a volume.
        seed: same seed, same bytes.
    """
    from scripts.data.phantoms import write_phantoms

    folder = _writable(output)
    path = write_phantoms(
        folder, training=training, validation=validation, test=test, size=size, slices=slices, seed=seed
    )
    return f"the datalist is {path}"


def prepare(
    name: str | None = None,
    *,
    source: str | None = None,
    output: str | None = None,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    strict: bool = False,
    leave_out_errors: bool = False,
    sequence: str | None = None,
    label_map: str | None = None,
    images: str | None = None,
    labels: str | None = None,
    classes: str | Sequence[str] | None = None,
    modality: str | None = None,
    split_table: str | None = None,
    workers: int = 1,
    progress_bar: bool = True,
) -> str:
    """Make the datalist of a data set in its owner's layout: find, check, split and count its cases.

    Args:
        name: of the data set, see docs/data.md; without one, all names are listed.
        source: folder of the data set as downloaded.
        output: folder of datalist.json and preparation.json; data/NAME if none is given.
        fractions: of the patients, for training, validation and test, where the owner has not split them.
        seed: of the split; same seed, same split.
        strict: take warnings as errors.
        leave_out_errors: leave cases with errors out, instead of stopping.
        sequence: of data sets with several MR sequences, such as flair or t1ce.
        label_map: what label values mean, such as 1=liver,2=spleen,3=none; for generic, medsam_npz and msd.
        images: for generic: where the images are, default images/{case}.{suffix}.
        labels: for generic: where the labels are, default labels/{case}.{suffix}; with {class} in it, one mask a class.
        classes: for generic with masks: the classes.
        modality: for generic and medsam_npz: CT, MR, endoscopy, dermoscopy, xray, fundus, ultrasound or microscopy.
        split_table: for generic: a CSV file with the columns case, split and, if known, patient.
        workers: how many processes read cases at the same time.
        progress_bar: whether to show one.
    """
    if name is None:
        return _list_of_sets()
    from scripts.data.converters import prepare as preparation
    from scripts.data.vocabulary import parse_prompts
    from scripts.report.preparation import render_preparation

    tables = preparation.read_tables(CONFIGS)
    if source is None:
        raise ConfigError(f"say where the files of {name} are: --source DIR")
    folder = _writable(f"data/{name}" if output is None else output)
    chosen = parse_prompts(classes)
    request = preparation.Request(
        name=name,
        source=Path(source).absolute(),
        output=folder,
        fractions=fractions,
        seed=seed,
        strict=as_setting(strict, False),
        leave_out_errors=as_setting(leave_out_errors, False),
        sequence=sequence,
        label_map=_as_label_map(label_map),
        classes=None if chosen is None else [str(word) for word in chosen],
        modality=modality,
        split_table=split_table,
        workers=workers,
        progress=as_setting(progress_bar, True),
        **{key: value for key, value in {"images": images, "labels": labels}.items() if value is not None},
    )
    record = preparation.prepare(request, tables)
    return f"{render_preparation(record)}\n\nthe datalist is {folder / 'datalist.json'}"


def _list_of_sets() -> str:
    from scripts.data.converters.layouts import PROGRAMS, names_of_sets, read_layouts
    from scripts.data.vocabulary import Vocabulary

    layouts = read_layouts(CONFIGS / "layouts.yaml", Vocabulary.read(CONFIGS / "classes.yaml"))
    titles = PROGRAMS | {name: layout.title for name, layout in layouts.items()}
    return "\n".join(f"{name:18s} {titles[name]}" for name in names_of_sets(layouts))


def _as_label_map(text: str | None) -> dict[int, str | None] | None:
    """Read `1=liver,2=spleen,3=none`; none is a value of no class.

    Raises:
        ConfigError: another form, or a value that comes twice.
    """
    if text is None:
        return None
    pairs = [(value.strip(), name.strip()) for value, _, name in (part.partition("=") for part in text.split(","))]
    values = [int(value) for value, name in pairs if value.isdecimal() and name]
    if len(values) < len(pairs) or len(set(values)) < len(values):
        raise ConfigError(f"--label-map is written 1=liver,2=spleen,3=none, each value once; got {text!r}")
    return {int(value): None if name.lower() == "none" else name for value, name in pairs}


def classes() -> str:
    """List the classes that have a name, and what the bundle's own model knows of them."""
    from scripts.data.vocabulary import Vocabulary
    from scripts.networks.model_card import ModelCard

    trained = ModelCard.beside(SHIPPED_MODEL).trained
    lines = []
    for entry in Vocabulary.read(CONFIGS / "classes.yaml").entries:
        known = [modality for modality, names in trained.items() if entry.name in names]
        note = f"known in {', '.join(known)}" if known else "not known to the shipped model"
        lines.append(f"{entry.id:3d}  {entry.name:18s} occurs in {', '.join(entry.modalities)}; {note}")
    return "\n".join(lines)


def half(model: str, *, output: str) -> str:
    """Copy a model and its card in half precision, for half the file.

    Args:
        model: a model.pt with its model.json.
        output: the new model.pt.
    """
    from scripts.networks.checkpoints import read_state_dict, save_state_dict
    from scripts.networks.model_card import ModelCard

    card, state = ModelCard.beside(model), read_state_dict(model)
    _writable(Path(output).parent)
    save_state_dict(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()}, output
    )
    card.write(Path(output).with_suffix(".json"))
    return f"wrote {output}"


def bundle(model: str, *, output: str, name: str | None = None) -> str:
    """Write a MONAI bundle of its own around a trained model, for MONAI Label, MONAI Deploy and python -m monai.bundle.

    Args:
        model: a model.pt with its model.json.
        output: folder of the bundle, new or empty.
        name: of the bundle in its metadata; the folder's if none is given.
    """
    from scripts.packaging import package_model

    known = ", ".join(package_model(model, output, name=name).classes.values())
    return f"the bundle is in {Path(output).absolute()}; its model knows {known}"


def publish(folder: str | None = None, *, output: str) -> str:
    """Write a bundle as it is downloaded: a zip for python -m monai.bundle, and a folder for Hugging Face.

    Args:
        folder: of the bundle, as `automedsam bundle` writes it; this software with its model if none is given.
        output: folder of both, new or empty.
    """
    from scripts.publishing import publish as publish_bundle

    written = publish_bundle(BUNDLE_ROOT if folder is None else folder, output)
    return f"{written.archive}\n{written.hub}\nSHA-256 of the zip: {written.sha256}"


def weights(action: str = "list", name: str | None = None, *, output: str | None = None) -> str:
    """List published weights (list), fetch some (get NAME), or say which of them a file is (verify FILE).

    Args:
        action: list, get or verify.
        name: to get: in the list; to verify: the file.
        output: folder of the files; the bundle's models/ if none is given.
    """
    from scripts.weights import perform_action

    folder = BUNDLE_ROOT / "models" if output is None else Path(output).absolute()
    return perform_action(action, name, listed=CONFIGS / "weights.yaml", folder=folder)


def export(*, output: str, checkpoint: str | None = None, formats: str = "onnx,pt2,safetensors,torchscript") -> str:
    """Write a model for other programs, each file compared with PyTorch before it takes its place, see docs/deploy.md.

    Args:
        output: folder of the files and of manifest.json.
        checkpoint: a trained model.pt with its model.json; the bundle's own if none is given.
        formats: some of onnx, pt2, safetensors and torchscript, separated by commas.
    """
    from scripts.engines.exporting import export_model

    path = SHIPPED_MODEL if checkpoint is None else Path(checkpoint).absolute()
    words = [word.strip() for word in formats.split(",") if word.strip()]
    folder = _writable(output)
    outcome = export_model(path, folder, formats=words)
    if outcome.failures:
        sys.stdout.write(f"{outcome.text}\n")
        reasons = "; ".join(f"{name} ({reason})" for name, reason in outcome.failures.items())
        raise ConfigError(f"not exported: {reasons}; the other files are in {folder}")
    return f"{outcome.text}\nthe files are in {folder}; manifest.json describes them"


def study(
    table: str,
    datalist: str | Sequence[str] | None = None,
    *,
    output: str | None = None,
    config: str | Sequence[str] = (),
    seeds: str = "0",
    noise_seeds: str = "",
    section: str = "test",
    presence: str | None = None,
    sets: str | None = None,
    only: str | None = None,
    **overrides: Any,
) -> str:
    """Train and evaluate the rows of one of the paper's tables, or of this bundle's own, and print them as a table.

    What is complete is not run again, so that the same command goes on with a study that broke off.

    Args:
        table: table_2 to table_8, hsp_prompts and others, or a .yaml file of the same form; see docs/studies.md.
        datalist: JSON file with the sections training, validation and test.
        output: folder of the runs and of table.txt, study.csv and study.json; runs/studies/TABLE if none is given.
        config: overlays over configs/train.json for all rows, separated by commas; those of a row lie over them.
        seeds: of the trainings, separated by commas.
        noise_seeds: evaluate each network with the noise of these seeds too, for its spread.
        section: which cases are evaluated.
        presence: all or oracle; the table's own if none is given.
        sets: NAME=DATALIST, separated by commas, for tables of several data sets.
        only: rows to run, separated by semicolons; what is complete of the others is shown too.
        overrides: further settings of configs/train.json for all rows, such as max_epochs.
    """
    from scripts.study.plan import TABLES, StudyPlan
    from scripts.study.rows import read_table
    from scripts.study.study import run_study

    datalists = _of_sets(datalist, sets)
    rows = read_table(table, TABLES, sets=list(datalists))
    folder = _writable(f"runs/studies/{rows.name}" if output is None else output)
    plan = StudyPlan(
        table=rows,
        datalists=datalists,
        output=folder,
        settings=overrides,
        overlays=find_overlays(config),
        seeds=_as_numbers(seeds),
        noise_seeds=_as_numbers(noise_seeds),
        section=section,
        presence=rows.presence if presence is None else presence,
        only=None if only is None else only.split(";"),
    )
    outcome = run_study(plan)
    if outcome.failures:
        sys.stdout.write(f"{outcome.text}\n")
        reasons = "; ".join(f"{name} ({reason})" for name, reason in outcome.failures.items())
        raise TrainingError(f"{len(outcome.failures)} of {len(rows.rows)} rows failed: {reasons}")
    return f"{outcome.text}\nthe runs and the table's files are in {folder}"


def _of_sets(datalist: str | Sequence[str] | None, sets: str | None) -> dict[str, Any]:
    """Name the data sets of a study; that of a single datalist is called after its folder.

    Raises:
        ConfigError: neither or both were given, or a set without a datalist or twice.
    """
    if (datalist is None) == (sets is None):
        raise ConfigError("give a study one datalist, or --sets NAME=DATALIST,NAME=DATALIST for tables of several sets")
    if sets is None:
        from scripts.data.datalist import folder_names

        found = _of_datalist(datalist or "")["datalist"]
        return {folder_names(found): found}
    pairs = [(name.strip(), path.strip()) for name, _, path in (part.partition("=") for part in sets.split(","))]
    if not all(name and path for name, path in pairs) or len(dict(pairs)) < len(pairs):
        raise ConfigError(f"--sets is written NAME=DATALIST,NAME=DATALIST, each name once; got {sets!r}")
    return {name: str(Path(path).absolute()) for name, path in pairs}


def _as_numbers(text: str) -> list[int]:
    """Read `0,1,2`; an empty text is none.

    Raises:
        ConfigError: another form, or a number that comes twice.
    """
    words = [word.strip() for word in str(text).strip("()[]").split(",") if word.strip()]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"seeds are different whole numbers separated by commas, such as 0,1,2; got {text!r}")
    return [int(word) for word in words]


def report(*runs: str, output: str = "report.html") -> str:
    """Write a page about finished runs: scores with intervals, charts, pictures of errors, and how they came about.

    The page needs nothing but itself; its charts lie beside it as PNG files too, in a folder of its name.

    Args:
        runs: folders that evaluate, score or train wrote; of several evaluations the first is what the others are
            compared with.
        output: the page.
    """
    from scripts.report.html.page import write_report
    from scripts.report.html.runs import read_runs

    found = read_runs([Path(run) for run in runs])
    path = Path(output).absolute()
    _writable(path.parent)
    return f"the report is {write_report(found, path)}"


def demo(*, output: str = "runs/demo") -> str:
    """Make phantoms, train on them, score unseen ones and segment one of them: the bundle's whole way, in minutes.

    Args:
        output: folder of everything made.
    """
    from scripts.demo import run_demo

    return run_demo(_writable(output))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb; errors that a user can mend become one line and exit code 1."""
    _quieten()
    verbs = {
        verb.__name__: later(verb)
        for verb in (
            infer,
            train,
            evaluate,
            score,
            compare,
            embed,
            prepare,
            phantoms,
            classes,
            half,
            export,
            weights,
            bundle,
            publish,
            study,
            report,
            demo,
        )
    }
    words = sys.argv[1:] if arguments is None else arguments
    try:
        fire.Fire(verbs, command=for_fire(words, verbs), name="automedsam", serialize=perform)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # who reads, `head` perhaps, has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from scripts.engines.evaluators import intended_error

        reason = intended_error(error)
        if reason is None:
            raise
        _fail(" ".join(str(reason).split()), 1)


def _fail(reason: str, code: int) -> None:
    """Say in one line why, below whatever progress bars are open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    sys.stderr.write(f"automedsam: {reason}\n")
    sys.exit(code)


class _AboveBars(logging.Handler):
    """Writes log lines to the error stream without tearing progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=sys.stderr)


def _quieten() -> None:
    """Show what the bundle says, and of the libraries only warnings."""
    # MONAI imports MLflow where it is installed, and that would report its use over the network.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_AboveBars()])
    logging.getLogger("scripts").setLevel(logging.INFO)
    # Ignite reports an exception that is reported again, in words, at the end.
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    for name in ("monai.bundle.workflows", "monai.bundle.config_parser"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    # `evaluate` prints the table itself.
    logging.getLogger("scripts.engines.scoring").setLevel(logging.WARNING)
    # The scores of each epoch without the date; exceptions are reported in words, at the end.
    scores = logging.getLogger(STATS_LOGGER)
    if not scores.handlers:
        scores.addHandler(_AboveBars())
        scores.addFilter(lambda record: not record.exc_info)
    # MONAI reminds at each start that configs are code; these are the bundle's own.
    warnings.filterwarnings("ignore", message=".*GHSA.*")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")


def _read_prompts(path: str | None, **parts: Any) -> "Prompts":
    """Read what is asked for, from a file or from its parts.

    Raises:
        PromptError: both were given, or what they hold is not written as it should be.
        InputError: the file cannot be read.
    """
    from scripts.data.prompts import Prompts

    if path is None:
        return Prompts.read(**parts)
    if any(part is not None for part in parts.values()):
        raise PromptError("give --prompts FILE, or --classes, --boxes and --points, not both")
    try:
        return Prompts.read(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; --prompts takes a JSON file, see docs/prompts.md") from error


def _require_sense(
    asked: "Prompts",
    modality: str | None,
    *,
    trained: Mapping[str, Sequence[str]],
    force: bool,
) -> None:
    """Refuse at once what no image could be asked for, instead of once for each.

    Raises:
        PromptError: an unknown class or modality, or a class that was not trained there.
    """
    from scripts.data.vocabulary import Vocabulary, choose_classes

    if asked.classes is not None or (modality is not None and not asked.objects):
        vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
        choose_classes(vocabulary, prompts=asked.classes, modality=modality, trained=trained, force=force)


def _require_network(asked: str | None, found: str, checkpoint: str | None) -> None:
    """Refuse a checkpoint of another network than the one that was asked for."""
    if asked is None or asked == found:
        return
    if asked not in NETWORK_OVERLAYS:
        raise ConfigError(f"the network is one of {', '.join(NETWORK_OVERLAYS)}, not {asked!r}")
    if checkpoint is None:
        raise ConfigError(
            f"the bundle's own model is of {found}: train {asked} with `automedsam train DATALIST --config "
            f"networks/{asked}.yaml` and give its model.pt with --checkpoint"
        )
    raise CheckpointError(f"{checkpoint} is a model of {found}, not of {asked}: give another, or leave --network out")


def _writable(path: str | Path) -> Path:
    """Make the output folder before any work, as an absolute path."""
    from scripts.data.writing import prepare_output_folder

    return prepare_output_folder(Path(path).absolute())


def _of_checkpoint(checkpoint: str | None, *, with_trained: bool = False) -> dict[str, Any]:
    """Give the settings that a weights file needs, from the card beside it."""
    from scripts.networks.model_card import ModelCard

    path = SHIPPED_MODEL if checkpoint is None else Path(checkpoint).absolute()
    if not path.is_file():
        raise CheckpointError(f"there is no weights file {path}: check the path; training writes model.pt")
    card = ModelCard.beside(path)
    # Of what was learned, evaluation asks for the quality head alone: the datalist says what its images show.
    learned = card.learned if with_trained else {"quality_head": card.learned["quality_head"]}
    return {"checkpoint": str(path), **card.settings, **learned}


def _of_published(checkpoint: str) -> dict[str, Any]:
    """Give the settings of a weights file that overlays describe; a card beside it counts all the same."""
    path = Path(checkpoint).absolute()
    if path.with_suffix(".json").is_file() or not path.is_file():
        return _of_checkpoint(checkpoint, with_trained=True)
    from scripts.networks.model_card import NOTHING_CHOSEN

    published = {"checkpoint": str(path), "architecture": "automedsam", "trained": {}, "boxes_trained": True}
    return published | NOTHING_CHOSEN


def _of_datalist(datalist: str | Sequence[str]) -> dict[str, Any]:
    """Give the settings of one datalist, or of several; of these each has its own folder."""
    names: Sequence[str] = datalist
    if isinstance(datalist, str):
        # A comma may be part of a file's name.
        names = [datalist] if Path(datalist).is_file() else datalist.split(",")
    paths = [str(Path(name.strip()).absolute()) for name in names]
    return {"datalist": paths if len(paths) > 1 else paths[0], "dataset_dir": str(Path(paths[0]).parent)}


def _annotated_ids(datalist: str | Sequence[str], dataset_dir: str | Path) -> list[int]:
    """Find the classes that the training cases teach."""
    from scripts.data.datalist import read_datalist
    from scripts.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
    cases = read_datalist(datalist, section="training", vocabulary=vocabulary, dataset_dir=dataset_dir)
    return sorted({class_id for case in cases for class_id in case["annotated"]})
