"""How benchmarks measure: wall time and peak memory, of calls and of whole processes, and a file of results.

Times are compared between variants that take turns in one run, so that what else the machine does falls on all alike.
The peak memory of a variant is that of a process which builds and runs this variant alone.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.files import atomic_path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnxruntime", "segment-anything", "monai", "numpy", "nibabel", "itk", "pillow")

Action = Callable[[], object]


class Seconds(float):
    """What an action gives that has measured itself, where not all of the call is meant."""


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
            raise RuntimeError(f"{' '.join(command)} failed: {process.stdout[-8000:].decode(errors='replace')}")
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


def write_result(name: str, values: Mapping[str, object], *, command: str, folder: Path = RESULTS) -> Path:
    """Write `<name>.json` with what was measured, where and with what.

    Args:
        name: of the row.
        values: what was measured.
        command: that measures it again.
        folder: of the results.
    """
    result = {
        "name": name,
        **values,
        "command": command,
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES}
        | {"python": platform.python_version()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
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
class Overhead:
    """How much longer the second of two variants takes.

    Attributes:
        overhead_percent: median of the rounds' overheads, in percent of the first variant's time.
        low: smallest overhead of a round.
        high: largest overhead of a round.
        runs: number of rounds.
        base_seconds: median time of the first variant.
        seconds: median time of the second.
    """

    overhead_percent: float
    low: float
    high: float
    runs: int
    base_seconds: float
    seconds: float


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


def race(
    variants: Mapping[str, Action], *, runs: int, repeats: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Measure variants in turns in this process, after one round that does not count.

    Args:
        variants: by name.
        runs: rounds that count.
        repeats: how often a variant runs in its turn, where it is too short to be timed once.

    Returns:
        Of each variant the seconds of one call in each round.
    """
    for action in variants.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, action in variants.items():
            times[name].append(_seconds(action, (repeats or {}).get(name, 1)))
    return times


def comparison(slow: Sequence[float], fast: Sequence[float]) -> Comparison:
    """Compare two variants by their seconds in the same rounds."""
    ratios = [first / second for first, second in zip(slow, fast, strict=True)]
    return Comparison(
        ratio=round(statistics.median(ratios), 2),
        low=round(min(ratios), 2),
        high=round(max(ratios), 2),
        runs=len(ratios),
        slow_seconds=round(statistics.median(slow), 4),
        fast_seconds=round(statistics.median(fast), 4),
    )


def overhead(base: Sequence[float], longer: Sequence[float]) -> Overhead:
    """Say how much longer a variant takes than another, by their seconds in the same rounds."""
    percents = [100 * (second / first - 1) for first, second in zip(base, longer, strict=True)]
    return Overhead(
        overhead_percent=round(statistics.median(percents), 1),
        low=round(min(percents), 1),
        high=round(max(percents), 1),
        runs=len(percents),
        base_seconds=round(statistics.median(base), 4),
        seconds=round(statistics.median(longer), 4),
    )


def _seconds(action: Action, repeats: int) -> float:
    """Time calls one after the other, and give the mean of one."""
    spent = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        spent += result if isinstance(result, Seconds) else time.perf_counter() - start
    return spent / repeats


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
