"""File paths with named gaps: how a layout says where images and labels lie."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scripts.errors import ConfigError

# What a gap may hold where the layout says nothing else.
_USUAL_FIELDS = {
    "slice": r"\d+",
    "nifti": r"nii\.gz|nii",
    "picture": r"png|jpg|jpeg|tif|tiff|bmp|gif|ppm|pgm",
    # The last part, of some volumes the last two: the case of scan.1.nii.gz is scan.1. Voxels whose header is a file of
    # its own (.mhd, .hdr) are no image by themselves.
    "suffix": r"(?:nii|gipl)\.gz|(?!(?:z?raw|img)$)[^./]+",
}
_ANYTHING = r"[^/]+?"
_ANYTHING_OR_NOTHING = r"[^/]*?"
_PARTS = re.compile(r"\{(?P<gap>[a-z_]+)\}|(?P<star>\*)|(?P<text>[^{}*]+|[{}])")
_HIDDEN = re.compile(r"^\.|^__MACOSX$|^Thumbs\.db$", re.IGNORECASE)


@dataclass(frozen=True)
class Match:
    """A file that fits a pattern.

    Attributes:
        path: relative to the folder searched, with slashes; a folder ends with one.
        fields: what stands in the gaps; `prefix` holds the folders above the pattern's own, but not one that holds
            nothing but a folder's double (`X/X/`), as some programs unpack an archive.
    """

    path: str
    fields: Mapping[str, str]


class PathPattern:
    """A relative path in which `{name}` stands for a part of a file's or folder's name and `*` for any such part.

    A name that comes twice stands for the same text both times. Upper and lower case are one, because owners and file
    systems do not agree on them. The pattern may begin in any sub-folder of the one searched, for archives unpack with
    or without a folder around them. A pattern that ends with a slash means folders.

    Args:
        text: for example `images/{patient}_slice_{slice}.{picture}`.
        fields: regular expressions of what gaps may hold; `slice` (digits), `nifti`, `picture` and `suffix` have
            theirs, all others hold anything but a slash.

    Raises:
        ConfigError: a gap that is not closed, or a field that is no regular expression.
    """

    def __init__(self, text: str, *, fields: Mapping[str, str] | None = None) -> None:
        self.text = text
        try:
            self._expression = re.compile(self._regular(text, {**_USUAL_FIELDS, **(fields or {})}), re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"the path pattern {text!r} cannot be read: {error}") from error
        self.names = frozenset(self._expression.groupindex)

    @property
    def several(self) -> bool:
        """Tell whether more than one file may fit the same fields."""
        return "*" in self.text

    def match(self, path: str) -> Match | None:
        """Fit a relative path with slashes; None when it does not."""
        found = self._expression.fullmatch(path)
        if found is None:
            return None
        fields = found.groupdict(default="")
        return Match(path, {**fields, "prefix": _undoubled(fields["prefix"], path)})

    def matches(self, paths: Iterable[str]) -> list[Match]:
        """Fit all paths, and give those that do, in their order."""
        return [match for match in map(self.match, paths) if match is not None]

    @staticmethod
    def _regular(text: str, fields: Mapping[str, str]) -> str:
        parts, seen = [r"(?P<prefix>(?:[^/]+/)*?)"], set()
        for part in _PARTS.finditer(text):
            gap = part["gap"]
            if gap is None:
                parts.append(_ANYTHING_OR_NOTHING if part["star"] else re.escape(part["text"]))
            elif gap in seen:
                parts.append(f"(?P={gap})")
            else:
                parts.append(f"(?P<{gap}>{fields.get(gap, _ANYTHING)})")
                seen.add(gap)
        if "{" in PathPattern._without_gaps(text) or "}" in PathPattern._without_gaps(text):
            raise ConfigError(f"the path pattern {text!r} has a brace without its partner")
        return "".join(parts)

    @staticmethod
    def _without_gaps(text: str) -> str:
        return re.sub(r"\{[a-z_]+\}", "", text)


def _undoubled(prefix: str, path: str) -> str:
    """Take the last folder off a prefix where the path goes on with a folder of the same name."""
    first, slash, _ = path.removeprefix(prefix).partition("/")
    return prefix.removesuffix(f"{first}/") if slash and f"/{prefix}".endswith(f"/{first}/") else prefix


class FileTree:
    """The files and folders under a folder, hidden ones and what archivers leave behind aside.

    Args:
        root: the folder.
        without: a folder that is left out with all below it, such as one that is written to.
    """

    def __init__(self, root: Path, *, without: Path | None = None) -> None:
        self.root = root
        self.without = None if without is None else os.path.abspath(without)

    @cached_property
    def files(self) -> list[str]:
        """Relative paths with slashes, in natural order (slice 2 before slice 10)."""
        return sorted((path for path in self._walk() if not path.endswith("/")), key=natural_order)

    @cached_property
    def folders(self) -> list[str]:
        """Relative paths of the folders, each with a slash at its end."""
        return sorted((path for path in self._walk() if path.endswith("/")), key=natural_order)

    def matches(self, pattern: PathPattern) -> list[Match]:
        """Give the files, or for a pattern with a slash at its end the folders, that fit."""
        return pattern.matches(self.folders if pattern.text.endswith("/") else self.files)

    def absolute(self, path: str) -> str:
        """Give the absolute path of a relative one."""
        return os.path.abspath(self.root / path)

    def _walk(self) -> list[str]:
        found = []
        for folder, inner, names in os.walk(self.root, followlinks=True):
            inner[:] = [name for name in inner if self._is_to_be_searched(Path(folder, name))]
            below = Path(folder).relative_to(self.root)
            found += [f"{(below / name).as_posix()}/" for name in inner]
            found += [(below / name).as_posix() for name in names if not _HIDDEN.match(name)]
        return found

    def _is_to_be_searched(self, folder: Path) -> bool:
        """Tell whether to go into a folder: not into a hidden one, and not by a link that leads round in a circle."""
        if _HIDDEN.match(folder.name) or os.path.abspath(folder) == self.without:
            return False
        return not folder.is_symlink() or folder.resolve() not in [above.resolve() for above in folder.parents]


def natural_order(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Give a sorting key under which numbers within names count as numbers; no two texts have the same."""
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
    return parts, text


def grouped(matches: Iterable[Match], names: Iterable[str]) -> dict[tuple[str, ...], list[Match]]:
    """Group matches by the values of some of their fields, upper and lower case being one."""
    wanted = sorted(names)
    groups: dict[tuple[str, ...], list[Match]] = defaultdict(list)
    for match in matches:
        groups[tuple(match.fields[name].casefold() for name in wanted)].append(match)
    return dict(groups)
