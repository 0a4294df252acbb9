"""Writing a file or a folder whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.errors import OutputError

TEMPORARY_PREFIX = ".partial-"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lend a temporary path to write to; it takes the place of ``path`` only when the block ends well.

    The temporary name lies in the folder of ``path`` (a rename across file systems is a copy, which can break off) and
    keeps its last two suffixes (.nii.gz), so that writers which choose a format by suffix choose the same one. A file
    that already stands at ``path`` stays untouched until the new one is complete. After an exception, Ctrl-C included,
    the temporary file is gone. The folder has to exist.

    Args:
        path: where the finished file has to be.

    Yields:
        The path to write to.

    Raises:
        OutputError: the block, or the final rename, met an ``OSError``; so let the block do nothing but write.
    """
    target = Path(path)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{''.join(target.suffixes[-2:])}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(_explain(target, error)) from error
    finally:
        # An unreachable folder has nothing to clean up, and must not hide the error that is on its way out.
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lend a temporary folder beside ``path``, which it becomes only when the block ends well.

    Args:
        path: where the finished folder has to be; nothing, or an empty folder, may stand there.

    Yields:
        The folder to fill.

    Raises:
        OutputError: the place is taken; or the block, or the final rename, met an ``OSError``.
    """
    folder = Path(path)
    if (folder.exists() or folder.is_symlink()) and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} is there already and not empty: choose another folder, or move it")
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.is_dir():  # an empty one
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(
            f"expected to write the folder {folder}, but the system answered '{error.strerror or error}'; choose a "
            "place that is writable and has space left"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_files(source: Path, patterns: Sequence[str], target: Path) -> None:
    """Copy the files of some patterns, but not their permissions: what is copied can be changed.

    Args:
        source: the folder that the patterns look in.
        patterns: as of `Path.glob`.
        target: the folder that takes their place.
    """
    for path in [path for pattern in patterns for path in sorted(source.glob(pattern))]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _explain(target: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    advice = "choose a folder that exists, is writable and has space left"
    if target.is_dir():
        advice = "a folder of that name stands there: move it or choose another name"
    return f"expected to write the file {target}, but the system answered '{reason}'; {advice}"
