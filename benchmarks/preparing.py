"""How long `automedsam prepare` takes, and how much memory: `python benchmarks/preparing.py [--data DIR]`.

Two real sets, where they are at hand (chaos_t2_mr: 16 volumes; kvasir_seg: 949 pairs), and a made CT volume of
512 x 512 x 400 voxels in the layout of AbdomenCT-1K, whose kidneys are divided by side on the way.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from measure import Run, describe, run_process, write_result

BUNDLE_ROOT = Path(__file__).resolve().parents[1]
REAL_SETS = ("chaos_t2_mr", "kvasir_seg")
TIME_LIMIT = 60.0  # s, on two cores
MEMORY_LIMIT = 3 * 1024  # MiB
SHAPE = (512, 512, 400)


def main() -> None:
    """Measure all that is at hand, print it and write `results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=BUNDLE_ROOT.parent / "shared" / "data", help="folder of real sets")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    for name in REAL_SETS:
        source = options.data / name
        if source.is_dir():
            report(f"prepare_{name}", ["shared", "--source", str(source)], runs=options.runs, limit=f"{TIME_LIMIT:g} s")
        else:
            say(f"{name}: left out, {source} is absent")
    with tempfile.TemporaryDirectory() as folder:
        make_large_volume(Path(folder))
        words = ["abdomenct1k", "--source", folder, "--fractions", "1,0,0"]
        report("prepare_large_ct", words, runs=1, limit=f"{MEMORY_LIMIT} MB")


def report(name: str, words: list[str], *, runs: int, limit: str) -> None:
    """Measure one command in fresh processes."""
    measured: list[Run] = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-m", "scripts", "prepare", *words, "--output", output, "--noprogress_bar"]
            measured.append(run_process(command))
    values = describe(measured)
    write_result(name, {**values, "limit": limit}, command="python benchmarks/preparing.py")
    say(f"{name}: {values['seconds']} s ({values['low']} to {values['high']}), {values['peak_mb']} MB; limit {limit}")


def make_large_volume(folder: Path) -> None:
    """Write a body of soft tissue with noise, and labels that touch most of it."""
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
    for path, voxels in {
        "AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz": volume,
        "Mask/Case_00001.nii.gz": labels,
    }.items():
        (folder / path).parent.mkdir()
        nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / path)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
