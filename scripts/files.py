"""Writing a file whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
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


def _explain(target: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    advice = "choose a folder that exists, is writable and has space left"
    if target.is_dir():
        advice = "a folder of that name stands there: move it or choose another name"
    return f"expected to write the file {target}, but the system answered '{reason}'; {advice}"
