"""What is read from the folders of runs, and what is said about folders that are none."""

import json

import numpy as np
import pytest

from scripts import cli
from scripts.errors import InputError
from scripts.report.html.runs import read_runs


def test_a_run_is_read_whole(write_run, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "losses.csv").write_text("epoch,iteration,loss,lambda_dice\n1,1,2.5,1\n1,2,,0.5\n")
    (folder / "epochs.csv").write_text("epoch,learning_rate\n1,1e-3\n")
    (folder / "quality.csv").write_text("case,class,dsc,predicted_by_head\na,liver,0.5,0.25\n")
    (folder / "uncertainty.json").write_text('{"bins": []}')
    (run,) = read_runs([folder])
    assert (run.name, run.protocol, run.classes, run.units) == ("run", "all", ["liver", "left kidney"], ["mm"])
    assert len(run.scores) == 10
    assert run.losses["iteration"].tolist() == [1, 2]
    assert np.isnan(run.losses["loss"][1])
    assert run.epochs["learning_rate"].tolist() == [1e-3]
    assert run.quality == [{"case": "a", "class": "liver", "dsc": "0.5", "predicted_by_head": "0.25"}]
    assert run.uncertainty == {"bins": []}
    assert [file.name for file in run.files] == [
        "metrics.csv",
        "losses.csv",
        "epochs.csv",
        "quality.csv",
        "summary.json",
        "run.json",
        "uncertainty.json",
    ]


def test_a_training_run_has_no_scores(tmp_path):
    (tmp_path / "losses.csv").write_text("epoch,iteration,loss\n1,1,2.5\n")
    (run,) = read_runs([tmp_path])
    assert (run.scores, run.classes, run.protocol) == ([], [], "")


def test_runs_of_one_name_go_by_their_paths(write_run, tmp_path):
    folders = [write_run(tmp_path / side / "run") for side in "ab"] + [write_run(tmp_path / "other")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


def test_no_folder_a_missing_one_and_one_twice_are_errors(write_run, tmp_path):
    with pytest.raises(InputError, match="at least one run"):
        read_runs([])
    with pytest.raises(InputError, match="nowhere"):
        read_runs([tmp_path / "nowhere"])
    folder = write_run(tmp_path / "run")
    with pytest.raises(InputError, match="a folder twice"):
        read_runs([folder, folder / ".." / "run"])


def test_an_empty_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.csv of an evaluation"):
        read_runs([tmp_path])


def test_the_command_names_an_empty_folder_and_ends_with_an_error(write_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [write_run(tmp_path / "run"), tmp_path / "empty", "--output", tmp_path / "report.html"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, words)])
    assert ended.value.code == 1
    assert f"automedsam: expected {tmp_path / 'empty' / 'metrics.csv'} of an evaluation" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.csv", "", "Expected the columns"),
        ("metrics.csv", "case,dice\na,0.5\n", "got case, dice"),
        ("losses.csv", "epoch,loss\n1,2\n", "a column iteration"),
        ("losses.csv", "epoch,iteration,loss\n1,1\n", "3 cells in row 2"),
        ("losses.csv", "epoch,iteration,loss\n1,1,high\n", "loss in row 2"),
        ("losses.csv", b"\xff\xfe", "CSV file"),
        ("epochs.csv", "iteration,loss\n1,2\n", "a column epoch"),
        ("quality.csv", "class,case\na,b\n", "the columns case, class, dsc"),
        ("run.json", "{", "JSON file"),
        ("run.json", "[1]", "a list"),
        ("uncertainty.json", "nothing", "JSON file"),
        ("summary.json", "{}", "one of the protocols all, oracle, got None"),
        ("summary.json", '{"protocol": "other"}', "got 'other'"),
    ],
)
def test_damaged_files_are_named(write_run, tmp_path, name, content, said):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as caught:
        read_runs([folder])
    assert str(folder / name) in str(caught.value)


def test_a_missing_summary_is_named(write_run, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json to name"):
        read_runs([folder])


def test_scores_without_a_row_and_a_row_twice_are_errors(write_run, tmp_path):
    path = write_run(tmp_path / "run") / "metrics.csv"
    head, first, *_ = path.read_text().splitlines(keepends=True)
    path.write_text(head)
    with pytest.raises(InputError, match="got none"):
        read_runs([path.parent])
    path.write_text(head + first + first)
    with pytest.raises(InputError, match="one row for 'liver' of 'case_00'"):
        read_runs([path.parent])


def test_the_record_is_read_as_it_is(write_run, tmp_path):
    folder = write_run(tmp_path / "run")
    assert read_runs([folder])[0].record == json.loads((folder / "run.json").read_text())
