"""What `automedsam infer` takes, as whole processes: `python benchmarks/inferring.py [--runs N]`.

LiteMedSAM's TinyViT at 256 pixels with random weights, four classes:

- a made CT volume of 256 x 256 x 36 voxels, against a process that calls the network slice by slice and class by class;
- the peak memory of 512 x 512 x 300 voxels;
- the time from the start of the process to the masks of a single slice, and where it goes.
"""

import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

import nibabel
import numpy as np
from measure import Run, comparison, describe, run_process, say, write_result
from model_files import write_model
from variants import Request, benchmark, say_row

ENCODER = "lite_medsam"
IMAGE_SIZE = 256  # pixels
SMALL_SIZE = 32
CLASSES = {1: "liver", 2: "spleen", 3: "pancreas", 4: "left kidney"}
RUNTIMES = ("torch", "onnx")
TARGET = 4.0  # of the better runtime
SHAPE = (256, 256, 36)
LARGE_SHAPE = (512, 512, 300)
SMALL_SHAPES = {SHAPE: (48, 40, 4), LARGE_SHAPE: (64, 64, 8)}
DISTINCT_SLICES = 20
MEMORY_LIMIT = 3 * 1024  # MiB
FIRST_SLICE_LIMIT = 12.0  # s
SPACING = (0.8, 0.8, 5.0)  # mm
SMALLEST_DICE = 0.999
IMPORT_LINE = re.compile(rb"import time:\s+(\d+) \|\s+\d+ \|\s*([\w.]+)")
PACKAGES_SHOWN = 6


def measure(request: Request) -> None:
    """Measure all three."""
    size = SMALL_SIZE if request.small else IMAGE_SIZE
    names = tuple(CLASSES.values())
    settings = {"image_encoder": ENCODER, "image_size": size, "class_ids": list(CLASSES), "preset": "release"}
    model = write_model(request.scratch / "model.pt", classes=names, **settings)
    slice_file = write_volume(request.scratch / "slice.nii.gz", shape_for(request, SHAPE), distinct=1, depth=1)
    volume(request, model, slice_file)
    large_volume(request, model)
    first_slice(request, model, slice_file)


def volume(request: Request, model: Path, slice_file: Path) -> None:
    """Compare `infer` with calling the network slice by slice and class by class, in either form of it."""
    shape = shape_for(request, SHAPE)
    source = write_volume(request.scratch / "volume.nii.gz", shape, distinct=shape[2])
    commands = {runtime: infer(model, source, request.scratch / runtime, runtime) for runtime in RUNTIMES}
    commands |= {form: one_by_one(model, source, request.scratch / f"{form}.nii.gz", form) for form in ("own", "plain")}
    for runtime in RUNTIMES:  # which makes the graphs of a runtime
        run_process(infer(model, slice_file, request.scratch / "before", runtime))
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(request.runs):
        for name, command in commands.items():
            runs[name].append(run_process(command))
    for runtime in RUNTIMES:
        agreement = {
            form: smallest_dice(request.scratch / runtime / "volume_seg.nii.gz", request.scratch / f"{form}.nii.gz")
            for form in ("own", "plain")
        }
        report_volume(request, runtime, runs, agreement)


def report_volume(request: Request, runtime: str, runs: dict[str, list[Run]], agreement: dict[str, float]) -> None:
    """Write the row of a runtime."""
    seconds = {name: [run.seconds for run in measured] for name, measured in runs.items()}
    peaks = {name: describe(measured)["peak_mb"] for name, measured in runs.items()}
    found, beside = (comparison(seconds[form], seconds[runtime]) for form in ("own", "plain"))
    values = {**asdict(found), "peak_mb": peaks[runtime], "slow_peak_mb": peaks["own"]}
    values |= {"target": TARGET if runtime == "onnx" else None}
    values |= {"beside": {"against": "plain form", **asdict(beside), "slow_peak_mb": peaks["plain"]}}
    values |= {"smallest_dice": {form: round(value, 6) for form, value in agreement.items()}}
    values |= {"note": "The label maps agree. The graphs of ONNX Runtime were made before."}
    name = f"infer_volume_{runtime}"
    write_result(name, values, command=request.command, folder=request.results)
    say_row(name, found, values)


def large_volume(request: Request, model: Path) -> None:
    """Weigh `infer` on a large volume."""
    source = write_volume(request.scratch / "large.nii.gz", shape_for(request, LARGE_SHAPE), distinct=DISTINCT_SLICES)
    found = describe([run_process(infer(model, source, request.scratch / "large", "torch"))])
    note = (
        f"{DISTINCT_SLICES} distinct slices, repeated: equal slices are computed once, so that the time is not that of "
        "as many distinct ones. The memory does not depend on it."
    )
    values = {**found, "limit": f"{MEMORY_LIMIT} MB", "note": note}
    write_result("infer_large_volume", values, command=request.command, folder=request.results)
    say(f"infer_large_volume: {found['peak_mb']} MB, below {MEMORY_LIMIT} MB asked for; {found['seconds']} s")


def first_slice(request: Request, model: Path, slice_file: Path) -> None:
    """Measure `infer` on one slice, and once more with a clock at each stage."""
    command = infer(model, slice_file, request.scratch / "first", "torch")
    found = describe([run_process(command) for _ in range(request.runs)])
    stages = stages_of(command[command.index("infer") :], request.scratch)
    values = {**found, "limit": f"{FIRST_SLICE_LIMIT:g} s", "stages": stages}
    values |= {"note": "The stages are those of one further run, which the clocks slow down a little."}
    write_result("infer_first_slice", values, command=request.command, folder=request.results)
    say(f"infer_first_slice: {found['seconds']} s, below {FIRST_SLICE_LIMIT:g} s asked for; {found['peak_mb']} MB")
    say("  " + ", ".join(f"{stage} {seconds} s" for stage, seconds in stages.items()))


def stages_of(words: list[str], scratch: Path) -> dict[str, float]:
    """Run a command with a clock at each stage.

    Args:
        words: behind `automedsam`.
        scratch: folder of the report.

    Returns:
        Seconds of each stage, the imports by package, of what is left, and of all together.

    Raises:
        RuntimeError: the command failed.
    """
    report = scratch / "stages.json"
    script = str(Path(__file__).with_name("stages.py"))
    start = time.monotonic()
    command = [sys.executable, "-X", "importtime", script, str(report), str(start), *words]
    process = subprocess.run(command, capture_output=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {process.stderr[-2000:].decode(errors='replace')}")
    stages = json.loads(report.read_text(encoding="utf-8"))
    total = stages.pop("total")
    stages |= imports_of(process.stderr)
    return {
        name: round(seconds, 2)
        for name, seconds in {**stages, "all else": total - sum(stages.values()), "total": total}.items()
    }


def imports_of(reported: bytes) -> dict[str, float]:
    """Sum up what Python reports of its imports: seconds by package, without what it imports, and the dearest apart."""
    by_package: dict[str, float] = defaultdict(float)
    for microseconds, module in IMPORT_LINE.findall(reported):
        package = module.decode().partition(".")[0]
        by_package["Python's own" if package in sys.stdlib_module_names else package] += int(microseconds) / 10**6
    dearest = sorted(by_package, key=lambda package: -by_package[package])[:PACKAGES_SHOWN]
    named = {f"importing {package}": by_package.pop(package) for package in dearest}
    return {**named, "importing other packages": sum(by_package.values())}


def infer(model: Path, source: Path, output: Path, runtime: str) -> list[str]:
    """Word the command."""
    words = [str(source), "--classes", ",".join(CLASSES.values()), "--modality", "CT", "--checkpoint", str(model)]
    words += ["--output", str(output), "--runtime", runtime, "--noprogress_bar"]
    return [sys.executable, "-m", "scripts", "infer", *words]


def one_by_one(model: Path, source: Path, output: Path, form: str) -> list[str]:
    """Word the process that `infer` is compared with."""
    script = str(Path(__file__).with_name("slice_by_slice.py"))
    words = [str(model), str(source), str(output), ",".join(map(str, CLASSES))]
    return [sys.executable, script, *words, *(["--plain"] if form == "plain" else [])]


def write_volume(path: Path, shape: tuple[int, int, int], *, distinct: int, depth: int | None = None) -> Path:
    """Write a CT of soft tissue with noise, in axes posterior, left, superior.

    Args:
        path: of the file.
        shape: rows, columns and slices.
        distinct: number of different slices, which repeat.
        depth: number of slices, where the shape is not to say it.
    """
    rows, columns, slices = shape
    rng = np.random.default_rng(0)
    down, right = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    made = []
    for number in range(distinct):
        organ = (down - 0.2) ** 2 + (right + 0.3 - number / 100) ** 2 < 0.15
        body = np.where(organ, 120, 40) + rng.normal(0, 20, (rows, columns))
        made.append(np.where(down**2 + right**2 < 0.8, body, -1000).astype(np.int16))
    voxels = np.stack(list(islice(cycle(made), depth or slices)), axis=2)
    affine = np.array([[0, -SPACING[1], 0, 0], [-SPACING[0], 0, 0, 0], [0, 0, SPACING[2], 0], [0, 0, 0, 1]])
    nibabel.nifti1.save(nibabel.nifti1.Nifti1Image(voxels, affine), path)
    return path


def shape_for(request: Request, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Give a volume's shape, or its small stand-in."""
    return SMALL_SHAPES[shape] if request.small else shape


def smallest_dice(first: Path, second: Path) -> float:
    """Compare two label maps: the Dice coefficient of the class that agrees least.

    Raises:
        RuntimeError: maps that are not those of one function, or that are empty.
    """
    labels, others = (np.asarray(nibabel.nifti1.load(path).dataobj) for path in (first, second))
    found = [i for i in CLASSES if (labels == i).any() or (others == i).any()]
    sizes = [int(np.sum(labels == i) + np.sum(others == i)) for i in found]
    scores = [2 * int(np.sum((labels == i) & (others == i))) / size for i, size in zip(found, sizes, strict=True)]
    if not found or min(scores) < SMALLEST_DICE:
        raise RuntimeError(f"{first.name} and {second.name} should agree, got the Dice coefficients {scores}")
    return min(scores)


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, runs=3)
