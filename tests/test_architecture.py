"""Arrows go one way: which room of scripts/ may know of which."""

import ast

import pytest

MAY_KNOW = {
    "networks": set(),
    "losses": {"networks"},
    "data": {"losses"},  # the loader draws the distance maps of the Shape Distance loss
    "metrics": set(),
    "report": {"data", "metrics"},
    "engines": {"networks", "losses", "data", "metrics", "report"},
    # It runs the verbs of the command line, as a person would.
    "study": {"cli", "workflow", "networks", "data", "metrics", "report", "engines"},
}
FOR_ALL = {"errors", "files"}


def imported_rooms(source: str) -> set[str]:
    """The parts of scripts/ that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("scripts.")}


@pytest.mark.parametrize("room", MAY_KNOW)
def test_a_room_knows_only_what_lies_below_it(bundle_root, room):
    files = sorted((bundle_root / "scripts" / room).rglob("*.py"))
    assert files
    for file in files:
        known = imported_rooms(file.read_text(encoding="utf-8")) - FOR_ALL - {room}
        assert known <= MAY_KNOW[room], f"{file.name} imports {known - MAY_KNOW[room]}"


def test_every_room_has_its_rule(bundle_root):
    rooms = {file.parent.name for file in (bundle_root / "scripts").glob("*/__init__.py")}
    assert rooms == set(MAY_KNOW)


def test_imports_are_found_in_every_form():
    source = "import scripts.data.guard\nfrom scripts.report import tables\ndef f():\n    from scripts import cli\n"
    assert imported_rooms(source) == {"data", "report", "cli"}
