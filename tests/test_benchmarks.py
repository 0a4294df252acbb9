"""What the benchmarks measure and a promise holds for: memory, never time."""

import sys

import pytest

MEMORY_LIMIT = 3 * 1024  # MiB


@pytest.fixture
def benchmarks(bundle_root, monkeypatch):
    """The folder of the benchmarks, whose modules import each other by name."""
    monkeypatch.syspath_prepend(str(bundle_root / "benchmarks"))
    return bundle_root / "benchmarks"


def test_a_process_is_measured(benchmarks):
    import measure

    hungry = measure.run_process([sys.executable, "-c", "x = bytearray(300 * 2**20)"])
    frugal = measure.run_process([sys.executable, "-c", "pass"])
    assert 290 < hungry.peak_mb - frugal.peak_mb < 330
    assert frugal.seconds > 0


def test_a_process_that_fails_is_no_measurement(benchmarks):
    import measure

    with pytest.raises(RuntimeError, match="out of luck"):
        measure.run_process([sys.executable, "-c", "raise SystemExit('out of luck')"])


def test_runs_are_summarised(benchmarks):
    import measure

    runs = [measure.Run(seconds, peak) for seconds, peak in ((3.0, 10.0), (1.0, 40.0), (2.0, 20.0))]
    assert measure.describe(runs) == {"seconds": 2.0, "low": 1.0, "high": 3.0, "runs": 3, "peak_mb": 40}


@pytest.mark.slow
def test_a_large_volume_is_prepared_within_three_gigabytes(benchmarks, bundle_root, monkeypatch, tmp_path):
    import measure
    import preparing

    monkeypatch.chdir(bundle_root)
    source = tmp_path / "source"
    source.mkdir()
    preparing.make_large_volume(source)
    words = ["abdomenct1k", "--source", str(source), "--output", str(tmp_path / "out"), "--fractions", "1,0,0"]
    run = measure.run_process([sys.executable, "-m", "scripts", "prepare", *words, "--noprogress_bar"])
    assert run.peak_mb < MEMORY_LIMIT
