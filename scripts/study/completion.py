"""What was finished, and with what: a marker in the folder of each run, with a fingerprint of all that decides it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from scripts.errors import InputError
from scripts.files import atomic_path

MARKER = "complete.json"


def digest(content: Any) -> str:
    """Hash JSON content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class FileDigests:
    """Hashes of files, each computed once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """Hash a file's bytes.

        Raises:
            InputError: the file cannot be read.
        """
        if path not in self._known:
            self._known[path] = _digest_of_file(path)
        return self._known[path]


def is_complete(folder: Path, fingerprint: str) -> bool:
    """Say whether a run was finished with just these settings."""
    return read_marker(folder).get("fingerprint") == fingerprint


def read_marker(folder: Path) -> dict[str, Any]:
    """Read what was written down of a finished run; nothing where there is no marker or a damaged one."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def require_new_run(folder: Path) -> None:
    """Take the marker away before anything is written, so that a run which breaks off is not complete."""
    (folder / MARKER).unlink(missing_ok=True)


def mark_complete(folder: Path, fingerprint: str, *, seconds: float, parameters: int | None = None) -> None:
    """Write down that a run was finished, with what and in which time; of a training how many parameters learnt."""
    content: dict[str, Any] = {"fingerprint": fingerprint, "seconds": round(seconds, 1)}
    if parameters is not None:
        content["parameters"] = parameters
    with atomic_path(folder / MARKER) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path") from error
