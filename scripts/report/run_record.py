"""What made a run's figures: the command, the versions, the files by their hashes, the settings, time and memory."""

import hashlib
import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from scripts.errors import InputError
from scripts.report.tables import write_json

_PACKAGES: Final = {"torch": "torch", "monai": "monai", "numpy": "numpy", "scipy": "scipy", "nibabel": "nibabel"}
_METADATA: Final = Path(__file__).resolve().parents[2] / "configs" / "metadata.json"
_BYTES_AT_ONCE: Final = 1 << 20
_BYTES_PER_MEGABYTE: Final = 1e6


def write_run_record(
    path: Path,
    *,
    files: Mapping[str, str | Path | Sequence[str | Path] | None],
    settings: Mapping[str, Any],
    seconds: float,
    failed: Mapping[str, str],
) -> None:
    """Write `run.json`.

    Args:
        path: File to write.
        files: Files that the figures depend on, one or several under each name; None where there is none. A folder
            stands for the files directly inside it.
        settings: What was chosen, by name. Values that JSON does not know are written as their text.
        seconds: How long it took.
        failed: Cases that could not be scored, with the reason.

    Raises:
        OutputError: The file cannot be written.
        InputError: One of the files cannot be read.
    """
    content = {
        "command": shlex.join(sys.orig_argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": {name: _described(entry) for name, entry in files.items() if entry is not None},
        "settings": {name: as_json(value) for name, value in settings.items()},
        "seconds": seconds,
        "peak_mb": peak_megabytes(),
        "failed": dict(failed),
    }
    write_json(content, path)


def versions() -> dict[str, str]:
    """Give the versions of Python, of the bundle and of what the figures depend on."""
    bundle = json.loads(_METADATA.read_text(encoding="utf-8"))["version"]
    packages = {name: importlib.metadata.version(package) for name, package in _PACKAGES.items()}
    return {"python": platform.python_version(), "automedsam": bundle, **packages}


def sha256_of(path: Path) -> str:
    """Hash a file, or of a folder the names and contents of the files directly inside it.

    Raises:
        InputError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if not path.is_dir():
            _add_content(digest, path)
        for part in sorted(path.iterdir()) if path.is_dir() else ():
            if part.is_file():
                digest.update(part.name.encode() + b"\0")
                _add_content(digest, part)
    except OSError as error:
        raise InputError(
            f"Expected a file to note the hash of at {path}, got: {error.strerror}; leave it there during the run."
        ) from error
    return digest.hexdigest()


def _add_content(digest: "hashlib._Hash", path: Path) -> None:
    """Hash a file in parts; a model may be large."""
    with path.open("rb") as file:
        while block := file.read(_BYTES_AT_ONCE):
            digest.update(block)


def peak_megabytes() -> float | None:
    """Give the most memory that this process has held, in MB of 10^6 bytes; None where the system does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    # Bytes on macOS, 1024 bytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _BYTES_PER_MEGABYTE


def as_json(value: Any) -> Any:
    """Reduce a setting to what JSON knows, all else to its text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, Sequence):
        return [as_json(part) for part in value]
    return str(value)


def _described(entry: str | Path | Sequence[str | Path]) -> Any:
    """Path and hash of one file, or of each of several."""
    if isinstance(entry, str | Path):
        return {"path": str(entry), "sha256": sha256_of(Path(entry))}
    return [_described(part) for part in entry]
