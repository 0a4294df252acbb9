"""`automedsam prepare` as a person types it, and in several processes."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import trees

from scripts import cli
from scripts.data.converters.layouts import names_of_sets
from scripts.data.converters.prepare import Request, prepare


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run `automedsam prepare` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = 0
        try:
            cli.main(["prepare", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


def check_refused(outcome, text):
    """One line on the error stream says what was wrong."""
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if line.strip()]
    assert outcome.code == 1
    assert lines[-1].startswith("automedsam: ")
    assert text in lines[-1]
    assert "Traceback" not in outcome.err


def test_without_a_name_all_are_listed(command, tables):
    outcome = command()
    assert outcome.code == 0
    rows = [line.split(maxsplit=1) for line in outcome.out.splitlines() if line]
    assert [name for name, _ in rows] == names_of_sets(tables.layouts)
    assert all(title for _, title in rows)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("kvasir_seg",), "say where the files of kvasir_seg are: --source DIR"),
        (("kvasir", "--source", "."), "the data set 'kvasir' is unknown; known are shared, generic"),
        (("kvasir_seg", "--source", "nowhere"), "nowhere is no folder; give the folder of the data set as --source"),
        (("kvasir_seg", "--source", "."), "holds no image of kvasir_seg: expected images/{case}.{picture}"),
        (("generic", "--source", "."), "--modality"),
        (("generic", "--source", ".", "--modality", "CT", "--label-map", "liver"), "--label-map is written 1=liver"),
        (
            ("amos", "--source", ".", "--label-map", "1=liver"),
            "--label-map is for generic, medsam_npz, msd, not for amos",
        ),
        (("kvasir_seg", "--source", ".", "--fractions", "0.8"), "--fractions are three shares"),
        (("kvasir_seg", "--source", ".", "--fractions", "0.8,0.2"), "--fractions are three shares"),
        (("kvasir_seg", "--source", ".", "--seed", "x"), "--seed is a whole number"),
        (("kvasir_seg", "--source", ".", "--workers", "0"), "--workers is a whole number of 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(command, words, text):
    check_refused(command(*words), text)


def test_a_set_is_prepared_and_told_about(command, tmp_path):
    trees.kvasir_seg(tmp_path / "2024.10")
    outcome = command(
        "kvasir_seg", "--source", "2024.10", "--output", "out", "--fractions", "0.8,0.1,0.1", "--seed", "3"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("kvasir_seg: 10 cases; split: drawn by patient (fractions 0.8/0.1/0.1, seed 3)\n")
    assert outcome.out.rstrip().endswith(f"the datalist is {tmp_path / 'out/datalist.json'}")
    assert "reading" in outcome.err  # the bar
    datalist = json.loads((tmp_path / "out/datalist.json").read_text())
    assert [len(datalist[name]) for name in ("training", "validation", "test")] == [8, 1, 1]
    assert not (tmp_path / "2024.10/datalist.json").exists()


def test_sets_of_ones_own_are_described_by_options(command, tmp_path):
    for number in range(4):
        trees.save_volume(trees.ct_volume(number), tmp_path / f"in/scans/p{number}/ct.nii.gz")
        for name, value in (("liver", 1), ("left_kidney", 2)):
            labels = (trees.label_volume(1, 2) == value).astype(np.uint8)
            trees.save_volume(labels, tmp_path / f"in/masks/{name}/p{number}.nii.gz")
    words = ["--source", "in", "--modality", "ct", "--images", "scans/{patient}/ct.nii.gz", "--progress-bar", "False"]
    words += ["--labels", "masks/{class}/{patient}.{nifti}", "--classes", "liver,left_kidney"]
    outcome = command("generic", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    datalist = json.loads((tmp_path / "data/generic/datalist.json").read_text())
    names = [entry["case"] for section in ("training", "validation", "test") for entry in datalist[section]]
    assert sorted(names) == ["p0", "p1", "p2", "p3"]
    assert datalist["training"][0]["counts"]["voxels"] == {"left kidney": 32, "liver": 32}


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tables, tmp_path):
    trees.abdomenct1k(tmp_path / "in")
    for workers in (1, 2):
        output = tmp_path / str(workers)
        output.mkdir()
        request = Request("abdomenct1k", tmp_path / "in", output, fractions=(1, 0, 0), workers=workers, progress=False)
        prepare(request, tables)
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "2")
    )
    assert first == second
    assert len(first) == 7  # five label volumes, the datalist and the record
