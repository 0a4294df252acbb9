"""`make demo`: phantoms, training, evaluation and inference in one go."""

import json
import time
from pathlib import Path

from scripts.data.phantoms import write_phantoms
from scripts.errors import InputError
from scripts.files import atomic_path

UNSEEN_SECTION = "test"


def run_demo(output: Path) -> str:
    """Do the bundle's whole job on phantoms.

    Args:
        output: an existing folder.

    Returns:
        The table of the unseen phantoms' scores, and where the pictures lie.
    """
    from scripts import cli

    start = time.monotonic()
    datalist = write_phantoms(output / "phantoms")
    cli.train(str(datalist), output=str(output), config="experiments/from_scratch.yaml,experiments/demo.yaml")
    checkpoint = str(output / "model.pt")
    table = cli.evaluate(str(datalist), checkpoint=checkpoint, section=UNSEEN_SECTION, output=str(output))
    volume = _first_unseen(datalist)
    cli.infer(str(volume), checkpoint=checkpoint, modality="CT", output=str(output / "segmented"))
    seconds = round(time.monotonic() - start)
    _add_seconds(output / "summary.json", seconds)
    picture = output / "segmented" / f"{volume.name.removesuffix('.nii.gz')}_overlay.png"
    return f"{table}\nsegmented an unseen volume: {picture}\nthe demo took {seconds} s"


def _first_unseen(datalist: Path) -> Path:
    """Find a volume that was not trained on."""
    cases = json.loads(datalist.read_text())[UNSEEN_SECTION]
    if not cases:
        raise InputError(f"{datalist} has no case in its section '{UNSEEN_SECTION}'")
    return datalist.parent / cases[0]["image"]


def _add_seconds(path: Path, seconds: int) -> None:
    """Write down how long the whole demo took."""
    content = json.loads(path.read_text()) | {"seconds": seconds}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
