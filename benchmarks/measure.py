"""How benchmarks measure: whole processes, wall time and peak memory, several runs, and a file of results."""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "monai", "numpy", "nibabel", "itk", "pillow")


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        seconds: wall time from its start to its end.
        peak_mb: the most memory that it held at a time (resident set), in MiB.
    """

    seconds: float
    peak_mb: float


def run_process(command: Sequence[str]) -> Run:
    """Run a command to its end, without its output.

    Raises:
        RuntimeError: it failed; the text is the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        runner = [sys.executable, "-S", str(Path(__file__).with_name("run_one.py")), str(report)]
        process = subprocess.run([*runner, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {process.stdout[-2000:].decode(errors='replace')}")
        return Run(**json.loads(report.read_text(encoding="utf-8")))


def describe(runs: Sequence[Run]) -> dict[str, float | int]:
    """Summarise runs of one command: median, smallest and largest wall time, and the highest memory."""
    seconds = [run.seconds for run in runs]
    return {
        "seconds": round(statistics.median(seconds), 2),
        "low": round(min(seconds), 2),
        "high": round(max(seconds), 2),
        "runs": len(runs),
        "peak_mb": round(max(run.peak_mb for run in runs)),
    }


def write_result(name: str, values: dict[str, object], *, command: str) -> Path:
    """Write `results/<name>.json` with what was measured, where and with what."""
    result = {
        "name": name,
        **values,
        "command": command,
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES}
        | {"python": platform.python_version()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    """Name the processor as the system does."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Comparison:
    """How many times faster the second of two variants is.

    Attributes:
        ratio: median of the rounds' ratios, time of the first variant over time of the second.
        low: smallest ratio of a round.
        high: largest ratio of a round.
        runs: number of rounds.
        slow_seconds: median time of the first variant.
        fast_seconds: median time of the second.
    """

    ratio: float
    low: float
    high: float
    runs: int
    slow_seconds: float
    fast_seconds: float


def compare(slow: Callable[[], object], fast: Callable[[], object], *, runs: int = 5) -> Comparison:
    """Measure two variants alternately in this process, after one round that does not count.

    Args:
        slow: the variant that the other is compared with.
        fast: the variant whose gain is asked for.
        runs: rounds that count; each measures both, so that what else the machine does falls on both alike.
    """
    slow(), fast()
    times = [(_seconds(slow), _seconds(fast)) for _ in range(runs)]
    ratios = [first / second for first, second in times]
    return Comparison(
        ratio=round(statistics.median(ratios), 2),
        low=round(min(ratios), 2),
        high=round(max(ratios), 2),
        runs=runs,
        slow_seconds=round(statistics.median(first for first, _ in times), 4),
        fast_seconds=round(statistics.median(second for _, second in times), 4),
    )


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_mb() -> int:
    """Give the most memory that this process has held at a time, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
