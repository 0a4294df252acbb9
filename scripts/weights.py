"""Published weights: which there are, how they are fetched, and how a file is told from another.

`configs/weights.yaml` is the list. A download goes into FILE.part and takes its name only once its size and hash are
those of the list; what broke off goes on where it stopped.
"""

import difflib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from tqdm import tqdm

from scripts.errors import CheckpointError, ConfigError, OutputError

PIECE = 1 << 20  # bytes read at a time
TIMEOUT = 60.0  # seconds without an answer
BY_HAND = ("drive.google.com",)  # hosts that show a page with a question in place of the file
OK, PARTIAL, NOT_SATISFIABLE = 200, 206, 416


@dataclass(frozen=True)
class Published:
    """One row of the list.

    Attributes:
        name: in the list, such as sam_vit_b.
        file: what the owner calls it.
        url: where it is.
        sha256: of the content, in hexadecimal; None where none is confirmed.
        size: in bytes; None where none is confirmed.
        licence: of the weights.
    """

    name: str
    file: str
    url: str
    sha256: str | None
    size: int | None
    licence: str


def read_published(path: str | Path) -> dict[str, Published]:
    """Read the list.

    Args:
        path: `configs/weights.yaml`, or a file of the same form.

    Returns:
        The rows by name, in the order of the list.

    Raises:
        ConfigError: it cannot be read, or a row lacks something.
    """
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {
            name: Published(name, row["file"], row["url"], row["sha256"], row["bytes"], row["licence"])
            for name, row in table.items()
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected rows with file, url, sha256, bytes and licence, got a list that cannot be used ({error})"
        ) from error


def list_weights(published: Mapping[str, Published], folder: Path) -> str:
    """Render the list: name, file, size, licence, and whether the file is there.

    Args:
        published: the rows by name.
        folder: where the files are expected. Of what is there only the size is looked at.
    """
    lines = [("name", "file", "size", "licence", f"in {folder.name}/")]
    lines += [
        (row.name, row.file, _megabytes(row.size), row.licence, _state(row, folder)) for row in published.values()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{text:{width}}" for text, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"


def _state(row: Published, folder: Path) -> str:
    target, part = folder / row.file, _part_of(folder / row.file)
    if target.is_file():
        same = row.size in (None, target.stat().st_size)
        return "yes" if same else f"a file of {target.stat().st_size} bytes in place of {row.size}"
    return f"begun, {_megabytes(part.stat().st_size)}" if part.is_file() else "no"


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def sha256_of(path: Path) -> str:
    """Hash a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path") from error


def verify(path: Path, published: Mapping[str, Published]) -> str:
    """Say which published file a file is, whatever it is called.

    Args:
        path: the file.
        published: the rows by name.

    Raises:
        CheckpointError: it cannot be read, or is none of them.
    """
    found = sha256_of(path)
    for row in published.values():
        if row.sha256 == found:
            return f"{path} is {row.name}: {row.file}, {row.licence}, from {row.url}"
    alike = next((row for row in published.values() if row.file == path.name and row.sha256), None)
    hint = "" if alike is None else f"; {alike.name} is called so, and has {alike.sha256}: fetch it again"
    raise CheckpointError(f"{path} is none of the published files: its SHA-256 is {found}{hint}")


# ------------------------------------------------------------------------------------------------------- downloading


def get(name: str, published: Mapping[str, Published], folder: Path, *, progress: bool = True) -> str:
    """Fetch a published file, or go on with what has been fetched of it.

    Args:
        name: of the row.
        published: the rows by name.
        folder: where it goes; it has to exist.
        progress: whether to show a bar.

    Returns:
        What was done, for people.

    Raises:
        ConfigError: there is no such row, or its owner lets only people fetch it.
        CheckpointError: no network, no such file, a download that broke off, or another file than the published one.
        OutputError: another file stands there, or it cannot be written.
    """
    row = _row(name, published)
    target = folder / row.file
    if target.exists():
        return _there_already(row, target)
    if urlsplit(row.url).hostname in BY_HAND:
        raise ConfigError(
            f"{row.name} cannot be fetched by a program: its owner's page asks a question first. Open {row.url} in a "
            f"browser, save the file as {target}, and look at it with: automedsam weights verify {target}"
        )
    part = _part_of(target)
    _download(row, part, progress=progress)
    _check(row, part)
    try:
        os.replace(part, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    checked = "its size and SHA-256 are" if row.size is not None else "its SHA-256 is"
    note = f"{checked} the published one" if row.sha256 else "no hash of it is published to compare it with"
    return f"{row.name} is in {target}; {note}; licence {row.licence}"


def _row(name: str, published: Mapping[str, Published]) -> Published:
    if name not in published:
        near = difflib.get_close_matches(name, published, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there are no published weights {name!r}, only {', '.join(published)}{hint}")
    return published[name]


def _there_already(row: Published, target: Path) -> str:
    if row.sha256 is None or sha256_of(target) == row.sha256:
        note = (
            "no hash of it is published to compare it with"
            if row.sha256 is None
            else "its SHA-256 is the published one"
        )
        return f"{row.name} is in {target} already; {note}"
    raise OutputError(f"{target} is there and is not {row.name}: move it away, or give another folder with --output")


def _check(row: Published, part: Path) -> None:
    """Refuse, and remove, what is not the published file."""
    size = part.stat().st_size
    if row.size is not None and size != row.size:
        part.unlink()
        raise _of_another_size(row, size)
    if row.sha256 is not None and (found := sha256_of(part)) != row.sha256:
        part.unlink()
        raise CheckpointError(
            f"{row.url}: expected the SHA-256 {row.sha256}, got {found}; nothing was kept. Try again; if it stays so, "
            "the owner has put another file there"
        )


def _of_another_size(row: Published, size: int | None) -> CheckpointError:
    return CheckpointError(
        f"{row.url}: expected {row.size} bytes, got {size}. Try again; if it stays so, the owner has put another file "
        "there"
    )


def _download(row: Published, part: Path, *, progress: bool) -> None:
    """Fill FILE.part, from where it ends."""
    begun = part.stat().st_size if part.is_file() else 0
    if row.size is not None and begun >= row.size:
        if begun == row.size:
            return
        begun = 0
    answer = _ask(row, begun)
    if answer is None:  # nothing is left from there on: whole and of unknown size, or of another file
        return
    with answer:
        begun = begun if answer.status == PARTIAL else 0  # a server that knows no ranges sends all of it
        expected = _total(answer, begun)
        _require_start(answer, begun, row)
        if None not in (row.size, expected) and row.size != expected:
            raise _of_another_size(row, expected)
        _copy(answer, part, row, begun=begun, expected=expected, progress=progress)
    if expected is not None and part.stat().st_size < expected:
        raise _broken_off(row, part, expected, None)


def _ask(row: Published, begun: int) -> Any:
    """Ask for a file from a byte on; None where the server says that it has no more."""
    if urlsplit(row.url).scheme not in ("http", "https"):
        raise ConfigError(f"{row.name}: expected an address that begins with https://, got {row.url}")
    headers = {"User-Agent": "automedsam"} | ({"Range": f"bytes={begun}-"} if begun else {})
    request = urllib.request.Request(row.url, headers=headers)  # noqa: S310 - looked at above
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == NOT_SATISFIABLE and begun:
            return None
        raise CheckpointError(
            f"{row.url}: expected the file, got the answer {error.code} {error.reason}; look at the owner's page, the "
            "file may have moved"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise CheckpointError(
            f"{row.url} cannot be reached ({reason}): is there a network? Fetch the file with another machine, save it "
            f"under its name {row.file}, and look at it with: automedsam weights verify FILE"
        ) from error


def _total(answer: Any, begun: int) -> int | None:
    """Say how long the file will be; None where the server does not tell."""
    length = answer.headers.get("Content-Length")
    return None if length is None or not length.isdecimal() else begun + int(length)


def _require_start(answer: Any, begun: int, row: Published) -> None:
    """Refuse a part of the file that is not the one asked for."""
    if answer.status != PARTIAL:
        return
    span = answer.headers.get("Content-Range", "")
    if not re.match(rf"bytes {begun}-", span):
        raise CheckpointError(f"{row.url}: expected the bytes from {begun} on, got {span or 'others'}; try again later")


def _copy(answer: Any, part: Path, row: Published, *, begun: int, expected: int | None, progress: bool) -> None:
    """Write what comes behind what is there; what has come stays when it breaks off."""
    bar = tqdm(
        desc=row.file, total=expected, initial=begun, unit="B", unit_scale=True, disable=not progress, leave=False
    )
    try:
        stream = part.open("r+b" if begun else "wb")
    except OSError as error:
        raise _unwritable(part, error) from error
    with stream, bar:
        stream.seek(begun)
        stream.truncate()
        while piece := _read(answer, row, part, expected):
            try:
                stream.write(piece)
            except OSError as error:
                raise _unwritable(part, error) from error
            bar.update(len(piece))


def _read(answer: Any, row: Published, part: Path, expected: int | None) -> bytes:
    try:
        return answer.read(PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise _broken_off(row, part, expected, error) from error


def _broken_off(row: Published, part: Path, expected: int | None, error: Exception | None) -> CheckpointError:
    reason = "" if error is None else f" ({error})"
    of = "" if expected is None else f" of {expected}"
    return CheckpointError(
        f"{row.url}: the download broke off{reason} before all{of} bytes had come; what has come is in {part}: give "
        "the same command again to go on"
    )


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"expected to write {path}, but the system answered '{error.strerror}'; choose a folder that is writable and "
        "has space left, with --output"
    )


# --------------------------------------------------------------------------------------------------------- the verb


def perform_action(action: str, name: str | None, *, listed: Path, folder: Path, progress: bool = True) -> str:
    """List, get or verify, as the command line words it.

    Args:
        action: list, get or verify.
        name: of the row to get, or path of the file to verify; None for list.
        listed: the list.
        folder: of the files.
        progress: whether to show a bar.

    Raises:
        ConfigError: another action, or one without or with too many words.
        AutoMedSAMError: see `get` and `verify`.
    """
    published = read_published(listed)
    if action == "list" and name is None:
        return list_weights(published, folder)
    if action == "get" and name is not None:
        from scripts.data.writing import prepare_output_folder

        return get(name, published, prepare_output_folder(folder), progress=progress)
    if action == "verify" and name is not None:
        return verify(Path(name), published)
    raise ConfigError(
        f"expected weights list, weights get NAME or weights verify FILE, got: weights {action} {name or ''}".rstrip()
    )
