"""How long `automedsam prepare` takes, and how much memory: `python benchmarks/preparing.py [--data DIR]`.

Two real sets, where they are at hand (chaos_t2_mr: 16 volumes; kvasir_seg: 949 pairs), and a made CT volume of
512 x 512 x 400 voxels in the layout of AbdomenCT-1K, whose kidneys are divided by side on the way.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from measure import Run, describe, run_process, say, write_result
from variants import Request, benchmark

REAL_SETS = ("chaos_t2_mr", "kvasir_seg")
TIME_LIMIT = 60.0  # s, on two cores
MEMORY_LIMIT = 3 * 1024  # MiB
SHAPE = (512, 512, 400)
SMALL_DIVISOR = 8


def measure(request: Request) -> None:
    """Measure all that is at hand."""
    for name in () if request.small else REAL_SETS:
        source = request.data / name
        if source.is_dir():
            report(request, f"prepare_{name}", ["shared", "--source", str(source)], limit=f"{TIME_LIMIT:g} s")
        else:
            say(f"{name}: left out, {source} is absent")
    folder = request.scratch / "large"
    folder.mkdir()
    make_large_volume(folder, divisor=SMALL_DIVISOR if request.small else 1)
    words = ["abdomenct1k", "--source", str(folder), "--fractions", "1,0,0"]
    report(request, "prepare_large_ct", words, limit=f"{MEMORY_LIMIT} MB")


def report(request: Request, name: str, words: list[str], *, limit: str) -> None:
    """Measure one command in fresh processes."""
    measured: list[Run] = []
    for _ in range(request.runs):
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-m", "scripts", "prepare", *words, "--output", output, "--noprogress_bar"]
            measured.append(run_process(command))
    values = describe(measured)
    write_result(name, {**values, "limit": limit}, command=request.command, folder=request.results)
    say(f"{name}: {values['seconds']} s ({values['low']} to {values['high']}), {values['peak_mb']} MB; limit {limit}")


def make_large_volume(folder: Path, *, divisor: int = 1) -> None:
    """Write a body of soft tissue with noise, and labels that touch most of it.

    Args:
        folder: of the data set.
        divisor: take only every so many voxels each way.
    """
    rng = np.random.default_rng(0)
    volume = np.full(SHAPE, -1000, dtype=np.int16)
    volume[60:450, 100:420] = rng.integers(0, 120, size=(390, 320, SHAPE[2]), dtype=np.int16)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[80:220, 150:350, 150:300] = 1
    labels[100:160, 250:330, 80:220] = 2
    labels[350:410, 250:330, 90:230] = 2
    labels[330:420, 150:230, 200:300] = 3
    labels[230:330, 180:220, 180:220] = 4
    affine = np.diag([-0.8, -0.8, 1.0, 1.0])
    files: dict[str, npt.NDArray[Any]] = {
        "AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz": volume,
        "Mask/Case_00001.nii.gz": labels,
    }
    for path, voxels in files.items():
        (folder / path).parent.mkdir()
        thinned = voxels[::divisor, ::divisor, ::divisor]
        nibabel.save(nibabel.Nifti1Image(thinned, affine), folder / path)


if __name__ == "__main__":
    benchmark(__file__, __doc__, measure=measure, runs=3)
