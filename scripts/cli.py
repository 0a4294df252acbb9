"""The command line: every verb calls a config or a function of the bundle and says in one line what went wrong."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
from tqdm import tqdm

from scripts.command_words import for_fire, later, perform
from scripts.errors import CheckpointError
from scripts.workflow import BUNDLE_ROOT, CONFIGS, find_overlays, run_configs

SHIPPED_MODEL = BUNDLE_ROOT / "models" / "model.pt"
INTERRUPTED = 130  # the shell's exit code for Ctrl-C
STATS_LOGGER = "monai.handlers.StatsHandler"


def infer(
    source: str,
    *,
    classes: str | Sequence[str | int] | None = None,
    modality: str | None = None,
    output: str = "out",
    checkpoint: str | None = None,
    probability_maps: bool = False,
    force: bool = False,
    **overrides: Any,
) -> str:
    """Segment a file or a folder: NIfTI and other volumes, DICOM series, PNG, JPG and TIFF images.

    Args:
        source: the file or folder.
        classes: names or ids, separated by commas; all that were trained for the modality if none is given.
        modality: CT, MR, endoscopy, dermoscopy or xray, where the file does not tell.
        output: folder of label maps, names, colours and overlay pictures.
        checkpoint: a trained model.pt with its model.json; the bundle's own if none is given.
        probability_maps: also write each class's probabilities, in which overlapping classes stay apart.
        force: accept classes that were not trained in this modality.
        overrides: further settings of configs/inference.json.
    """
    model = _of_checkpoint(checkpoint, with_trained=True)
    _require_sense(classes, modality, trained=model["trained"], force=force)
    folder = _writable(output)
    settings = {
        "dataset_dir": str(Path(source).absolute()),
        "classes": classes,
        "modality": modality,
        "output_dir": str(folder),
        "probability_maps": probability_maps,
        "force": force,
    }
    run_configs(["inference.json"], {**settings, **model, **overrides})
    return f"label maps, names and pictures are in {folder}"


def train(
    datalist: str,
    *,
    output: str = "runs/train",
    config: str | Sequence[str] = (),
    from_scratch: bool = False,
    resume: str | None = None,
    **overrides: Any,
) -> str:
    """Train AutoMedSAM on the cases of a datalist.

    Args:
        datalist: JSON file with the sections training and validation, see docs/data.md.
        output: folder of model.pt, model.json, last.pt, losses.csv and epochs.csv.
        config: overlays over configs/train.json, separated by commas; names within configs/ will do.
        from_scratch: start from random weights and train the image encoder too.
        resume: the last.pt of a run to go on with.
        overrides: further settings of configs/train.json, such as max_epochs.
    """
    path = Path(datalist).absolute()
    folder = _writable(output)
    settings: dict[str, Any] = {
        "datalist": str(path),
        "dataset_dir": str(path.parent),
        "output_dir": str(folder),
        "resume": None if resume is None else str(Path(resume).absolute()),
    }
    if from_scratch:
        settings |= {"pretrained": None, "train_image_encoder": True}
    if "class_ids" not in overrides:
        settings["class_ids"] = _annotated_ids(path, overrides.get("dataset_dir", path.parent))
    run_configs(["train.json", *find_overlays(config)], {**settings, **overrides})
    return f"the best network is {folder / 'model.pt'}; its way there is in epochs.csv and losses.csv"


def evaluate(
    datalist: str,
    *,
    checkpoint: str | None = None,
    section: str = "test",
    presence: str = "all",
    output: str = "runs/evaluate",
    **overrides: Any,
) -> str:
    """Score a model on a section of a datalist: DSC and NSD of each class in the cases' own spacing.

    Args:
        datalist: JSON file, see docs/data.md.
        checkpoint: a trained model.pt with its model.json; the bundle's own if none is given.
        section: which cases.
        presence: `all` asks for every class in every slice, `oracle` only for those that the truth has there.
        output: folder of metrics.csv and metrics.json.
        overrides: further settings of configs/train.json and configs/evaluate.json.
    """
    path = Path(datalist).absolute()
    folder = _writable(output)
    settings = {
        "datalist": str(path),
        "dataset_dir": str(path.parent),
        "validation_section": section,
        "presence": presence,
        "output_dir": str(folder),
    }
    workflow = run_configs(["train.json", "evaluate.json"], {**settings, **_of_checkpoint(checkpoint), **overrides})
    from scripts.report.tables import render_table

    summary = workflow.parser.get_parsed_content("validate#scores").summary()
    return f"{render_table(summary)}\nevery case's scores are in {folder / 'metrics.csv'}"


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
    verbs = {verb.__name__: later(verb) for verb in (infer, train, evaluate, phantoms, classes, half, demo)}
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


def _require_sense(
    asked: str | Sequence[str | int] | None,
    modality: str | None,
    *,
    trained: Mapping[str, Sequence[str]],
    force: bool,
) -> None:
    """Refuse at once what no image could be asked for, instead of once for each.

    Raises:
        PromptError: an unknown class or modality, or a class that was not trained there.
    """
    from scripts.data.vocabulary import Vocabulary, choose_classes, parse_prompts

    prompts = parse_prompts(asked)
    if prompts is not None or modality is not None:
        vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
        choose_classes(vocabulary, prompts=prompts, modality=modality, trained=trained, force=force)


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
    return {
        "checkpoint": str(path),
        **card.network,
        **card.preprocessing,
        **({"trained": card.trained} if with_trained else {}),
    }


def _annotated_ids(datalist: Path, dataset_dir: str | Path) -> list[int]:
    """Find the classes that the training cases teach."""
    from scripts.data.datalist import read_datalist
    from scripts.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.read(CONFIGS / "classes.yaml")
    cases = read_datalist(datalist, section="training", vocabulary=vocabulary, dataset_dir=dataset_dir)
    return sorted({class_id for case in cases for class_id in case["annotated"]})
