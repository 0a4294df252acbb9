"""What `run.json` says of a run."""

import hashlib
import json
import math
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.errors import InputError
from scripts.report.run_record import as_json, peak_megabytes, sha256_of, write_run_record


def record(folder: Path, **changes: object) -> dict[str, object]:
    arguments = {"files": {}, "settings": {}, "seconds": 1.5, "failed": {}}
    write_run_record(folder / "run.json", **(arguments | changes))  # type: ignore[arg-type]
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_command_date_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["automedsam", "evaluate", "a b.json"])
    content = record(tmp_path)
    assert content["command"] == "automedsam evaluate 'a b.json'"
    assert abs(datetime.fromisoformat(str(content["date"])) - datetime.now(UTC)) < timedelta(minutes=5)
    versions = content["versions"]
    assert isinstance(versions, dict)
    assert (versions["torch"], versions["numpy"]) == (torch.__version__.split("+")[0], np.__version__)
    assert {"python", "monai", "automedsam"} <= set(versions)


def test_files_by_their_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two" * 1_000_000)
    files = record(
        tmp_path, files={"model": tmp_path / "a", "lists": [tmp_path / "a", str(tmp_path / "b")], "no": None}
    )
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two" * 1_000_000))
    assert files["files"] == {
        "model": {"path": str(tmp_path / "a"), "sha256": one},
        "lists": [{"path": str(tmp_path / "a"), "sha256": one}, {"path": str(tmp_path / "b"), "sha256": two}],
    }


def test_a_folders_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"one")
    assert sha256_of(tmp_path / "first") == sha256_of(tmp_path / "second")
    (tmp_path / "second" / "x").write_bytes(b"two")
    changed = sha256_of(tmp_path / "second")
    assert changed != sha256_of(tmp_path / "first")
    (tmp_path / "second" / "x").rename(tmp_path / "second" / "y")
    assert sha256_of(tmp_path / "second") != changed


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pt"):
        record(tmp_path, files={"model": tmp_path / "gone.pt"})
    assert not (tmp_path / "run.json").exists()


def test_settings_as_json_knows_them() -> None:
    settings = {"a": (1, 2.5), "b": {"c": None, 3: True}, "d": math.inf, "e": torch.device("cpu")}
    expected = {"a": [1, 2.5], "b": {"c": None, "3": True}, "d": "inf", "e": "cpu"}
    assert as_json(settings) == expected


def test_memory_is_in_megabytes() -> None:
    held = np.ones(50_000_000, np.uint8)
    peak = peak_megabytes()
    if peak is None:
        pytest.skip("this system does not tell")
    assert 50 < peak < 1e6
    assert held.all()
