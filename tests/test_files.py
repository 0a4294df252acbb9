"""scripts/files.py: a file appears whole or not at all."""

import pytest

from scripts.errors import OutputError
from scripts.files import atomic_path


def write_half(target, exception):
    """Breaks off in the middle of a file."""
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise exception


def test_file_appears_with_its_content_only_at_the_end(tmp_path):
    target = tmp_path / "table.csv"
    with atomic_path(target) as temporary:
        temporary.write_text("a,b")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert target.read_text() == "a,b"


@pytest.mark.parametrize("name", ["scan.nii.gz", "model.pt", "bare", "scan.1.2.840.nii.gz", ".hidden"])
def test_temporary_name_keeps_the_suffixes_that_name_a_format(tmp_path, name):
    target = tmp_path / name
    with atomic_path(str(target)) as temporary:
        assert temporary != target
        assert temporary.suffixes == target.suffixes[-2:]
        temporary.touch()
    assert target.is_file()


def test_longest_possible_name_still_fits(tmp_path):
    target = tmp_path / ("n" * 248 + ".nii.gz")
    with atomic_path(target) as temporary:
        temporary.touch()
    assert target.is_file()


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, MemoryError])
def test_failure_midway_leaves_nothing_and_passes_the_exception_on(tmp_path, exception):
    with pytest.raises(exception, match="midway"):
        write_half(tmp_path / "half.png", exception("midway"))
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_file_that_stood_there(tmp_path):
    target = tmp_path / "model.pt"
    target.write_text("old")
    with pytest.raises(ValueError, match="midway"):
        write_half(target, ValueError("midway"))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_success_replaces_the_file_that_stood_there(tmp_path):
    target = tmp_path / "model.pt"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_full_disk_becomes_an_output_error_naming_the_target(tmp_path):
    with pytest.raises(OutputError, match=r"half\.png.*No space left"):
        write_half(tmp_path / "half.png", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_os_error_without_a_number_keeps_its_text(tmp_path):
    with pytest.raises(OutputError, match="cannot write mode"), atomic_path(tmp_path / "half.png"):
        raise OSError("cannot write mode F as PNG")


def test_missing_folder_becomes_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="choose a folder"), atomic_path(tmp_path / "absent" / "a.txt") as temporary:
        temporary.write_text("a")


def test_folder_below_a_file_becomes_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose a folder"), atomic_path(tmp_path / "file" / "a.txt") as temporary:
        temporary.write_text("a")


def test_folder_in_the_place_of_the_file_becomes_an_output_error(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OutputError, match="a folder of that name"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_block_that_writes_nothing_becomes_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No such file"), atomic_path(tmp_path / "a.txt"):
        pass
