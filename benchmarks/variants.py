"""A benchmark's command line and its variants: timed in turns in one process, and each weighed in one of its own."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from measure import RESULTS, Action, Comparison, comparison, race, run_process, say, write_result
from torch.utils.flop_counter import FlopCounterMode

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL_RESULTS = Path("build") / "benchmarks"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        script: file name of the benchmark.
        runs: rounds that count.
        small: whether to shrink everything, to see that it runs; the figures then mean nothing.
        results: folder of the results.
        alone: name of the one variant to build and run once; empty to measure.
        scratch: folder of what the variants share, such as weights.
        data: folder of real data sets, for the benchmarks that use them.
    """

    script: str
    runs: int
    small: bool
    results: Path
    alone: str
    scratch: Path
    data: Path

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        return f"python benchmarks/{self.script} --runs {self.runs}{' --small' if self.small else ''}"


Builder = Callable[[Request], Action]


def benchmark(
    script: str,
    description: str | None,
    *,
    measure: Callable[[Request], None],
    variants: Mapping[str, Builder] | None = None,
    runs: int = 5,
) -> None:
    """Read the command line, and measure or run one variant.

    Args:
        script: `__file__` of the benchmark.
        description: its docstring, whose first line is the help.
        measure: measures all, with a scratch folder that is removed behind it.
        variants: what prepares each variant, by name.
        runs: rounds where the command line names none.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=runs, help="rounds that count")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--results", type=Path, help=f"folder of the results, else results/ or {SMALL_RESULTS}")
    parser.add_argument("--alone", default="", choices=["", *(variants or {})], help="run one variant once")
    parser.add_argument("--scratch", type=Path, help="folder of what variants share; for --alone")
    parser.add_argument("--data", type=Path, default=REAL_DATA, help="folder of real data sets")
    options = parser.parse_args()
    results = options.results or (SMALL_RESULTS if options.small else RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        scratch = options.scratch or Path(folder)
        request = Request(Path(script).name, options.runs, options.small, results, options.alone, scratch, options.data)
        if request.alone:
            (variants or {})[request.alone](request)()
        else:
            measure(request)


def without_gradient(action: Callable[[], Result]) -> Callable[[], Result]:
    """Let an action run as inference does."""
    return torch.no_grad()(action)


def peak_alone(request: Request, variant: str) -> int:
    """Weigh a variant in a process that builds and runs nothing else: peak resident memory in MiB."""
    script = Path(__file__).with_name(request.script)
    words = ["--alone", variant, "--scratch", str(request.scratch), *(["--small"] if request.small else [])]
    return round(run_process([sys.executable, str(script), *words]).peak_mb)


def compare(
    request: Request,
    variants: Mapping[str, Builder],
    *,
    slow: str,
    rows: Mapping[str, str],
    targets: Mapping[str, float],
    repeats: Mapping[str, int] | None = None,
    beside: str | None = None,
    floor: str | None = None,
    note: str = "",
) -> None:
    """Measure variants against one of them, and write a row for each of the others.

    Args:
        request: from the command line.
        variants: what prepares each, by name.
        slow: what the others are compared with.
        rows: variant -> name of its row.
        targets: variant -> the ratio to be reached.
        repeats: see `race`.
        beside: a second variant to compare with, whose ratio is stated too.
        floor: a variant that does no arithmetic twice and whose operations PyTorch can count; stated beside the row is
            what they would take at the rate of a large product of matrices, which no variant can be expected to beat.
        note: what a reader must know.
    """
    wanted = [slow, *([beside] if beside else []), *rows]
    times = race({name: variants[name](request) for name in wanted}, runs=request.runs, repeats=repeats)
    slow_peak = peak_alone(request, slow)
    for variant, row in rows.items():
        found = comparison(times[slow], times[variant])
        values = {**asdict(found), "peak_mb": peak_alone(request, variant), "slow_peak_mb": slow_peak}
        values |= {"target": targets.get(variant), "note": note}
        if beside:
            second = comparison(times[beside], times[variant])
            values |= {"beside": {"against": beside, **asdict(second), "slow_peak_mb": peak_alone(request, beside)}}
        if floor:
            values |= {"floor": floor_of(variants[floor](request), slow_seconds=found.slow_seconds)}
        write_result(row, values, command=request.command, folder=request.results)
        say_row(row, found, values)


def floor_of(action: Action, *, slow_seconds: float) -> dict[str, float]:
    """Count an action's multiplications and additions, and say how long the processor takes for so many at best.

    Args:
        action: to be counted.
        slow_seconds: of what a row compares with, for the largest ratio that there can be.
    """
    with FlopCounterMode(display=False) as counter:
        action()
    operations, rate = counter.get_total_flops() / 10**9, matrix_rate()
    seconds = operations / rate
    return {
        "gflop": round(operations, 1),
        "gflop_a_second": round(rate, 1),
        "seconds": round(seconds, 4),
        "ratio": round(slow_seconds / seconds, 2),
    }


def matrix_rate(*, size: int = 2048, runs: int = 20) -> float:
    """Measure the product of two matrices in single precision, in GFLOP/s: the best of several."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn((size, size), generator=generator) for _ in range(2))
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        torch.mm(first, second)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 10**9


def say_row(name: str, found: Comparison, values: Mapping[str, object]) -> None:
    """Print a row of a comparison."""
    target = f", at least {values['target']:g} asked for" if values.get("target") else ""
    say(
        f"{name}: {found.ratio} times ({found.low} to {found.high}) in {found.runs} runs{target}; "
        f"{found.slow_seconds} s and {values['slow_peak_mb']} MB against {found.fast_seconds} s and "
        f"{values['peak_mb']} MB"
    )


def require_equal(reference: torch.Tensor, others: Sequence[torch.Tensor], *, tolerance: float) -> None:
    """Refuse to compare the times of different functions.

    Args:
        reference: output of the plain form.
        others: outputs of the other variants for the same input.
        tolerance: largest difference, relative to the reference's largest value.

    Raises:
        RuntimeError: an output that differs by more.
    """
    for other in others:
        difference = float((other - reference).abs().max() / reference.abs().max())
        if not difference <= tolerance:
            raise RuntimeError(f"expected equal outputs to {tolerance:g}, got {difference:.3g}: nothing was measured")
