"""What the benchmarks compare with, measure, write and show; and memory, where it is promised. Never time."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.errors import ConfigError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.forward_diffusion import accumulated_noise_scale

MEMORY_LIMIT = 3 * 1024  # MiB
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = sorted((FOLDER / "results").glob("*.json"))
EVERY_ROW = {"name", "low", "high", "runs", "peak_mb", "command", "machine", "versions"}
STEPS = 5


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The modules of the benchmarks import each other by name."""
    monkeypatch.syspath_prepend(str(FOLDER))


def released_network(generator, *, image_encoder, image_size):
    """A network in which nothing that a shortcut could lose is zero or one."""
    network = AutoMedSAM(
        image_encoder=image_encoder,
        image_size=image_size,
        class_ids=[1, 2, 3],
        preset="release",
        channels=(8, 12, 16),
        diffusion_steps=STEPS,
    ).eval()
    for name, values in network.state_dict().items():
        if "running_var" in name or name.endswith("bn.weight"):
            values.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith(("running_mean", "bn.bias", "attention_biases", "pos_embed", "rel_pos_h", "rel_pos_w")):
            values.normal_(generator=generator)
    return network


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


class TestPlainNetworks:
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize(
        ("image_encoder", "image_size"), [("lite_medsam", 40), ("mobile_sam", 96), ("sam_vit_b", 48)]
    )
    def test_an_image_encoder_gives_the_same_embedding(self, generator, image_encoder, image_size, batch):
        from plain_networks import plain_image_encoder

        network = released_network(generator, image_encoder=image_encoder, image_size=image_size)
        image = torch.rand((batch, 3, image_size, image_size), generator=generator)
        with torch.no_grad():
            found = plain_image_encoder(network.image_encoder)(image)
            assert relative_difference(found, network.encode_image(image)) < 1e-4

    def test_a_call_without_noise_gives_the_same_logits(self, generator):
        from plain_networks import PlainAutoMedSAM

        network = released_network(generator, image_encoder="lite_medsam", image_size=40)
        plain = PlainAutoMedSAM(network)
        image = torch.rand((1, 3, 40, 40), generator=generator)
        with torch.no_grad():
            expected = network(image, class_ids=torch.tensor([[3, 1]])).logits
            found = torch.cat([plain(image, 3), plain(image, 1)], dim=1)
        assert relative_difference(found, expected) < 1e-4

    def test_the_steps_of_noise_add_up_to_the_draw_of_the_closed_form(self, generator):
        from plain_networks import PlainAutoMedSAM

        network = released_network(generator, image_encoder="lite_medsam", image_size=40)
        draws = [torch.randn((1, 256, 10, 10), generator=generator) for _ in range(STEPS)]
        remaining = iter(draws)  # the loop goes from step T to step 1
        plain = PlainAutoMedSAM(network, draw=lambda shape: next(remaining))
        together = sum(draw / (step + 1) for draw, step in zip(draws, range(STEPS, 0, -1), strict=True))
        noise = (together / accumulated_noise_scale(STEPS)).unsqueeze(1)
        image = torch.rand((1, 3, 40, 40), generator=generator)
        with torch.no_grad():
            expected = network(image, class_ids=torch.tensor([[2]]), noise=noise).logits
            assert relative_difference(plain(image, 2), expected) < 1e-4
        assert next(remaining, None) is None

    def test_no_plain_form_of_what_nobody_released(self):
        from plain_networks import PlainAutoMedSAM

        with pytest.raises(ConfigError, match="expected a TinyViT or SAM's ViT, got CompactEncoder"):
            PlainAutoMedSAM(AutoMedSAM(image_encoder="compact", image_size=32, preset="release"))
        with pytest.raises(ConfigError, match="preset release, not of paper"):
            PlainAutoMedSAM(AutoMedSAM(image_encoder="lite_medsam", image_size=32, preset="paper"))


class TestMeasuring:
    def test_a_process_is_measured(self):
        from measure import run_process

        hungry = run_process([sys.executable, "-c", "x = bytearray(300 * 2**20)"])
        frugal = run_process([sys.executable, "-c", "pass"])
        assert 290 < hungry.peak_mb - frugal.peak_mb < 330
        assert frugal.seconds > 0

    def test_a_process_that_fails_is_no_measurement(self):
        from measure import run_process

        with pytest.raises(RuntimeError, match="out of luck"):
            run_process([sys.executable, "-c", "raise SystemExit('out of luck')"])

    def test_runs_are_summarised(self):
        from measure import Run, describe

        runs = [Run(seconds, peak) for seconds, peak in ((3.0, 10.0), (1.0, 40.0), (2.0, 20.0))]
        assert describe(runs) == {"seconds": 2.0, "low": 1.0, "high": 3.0, "runs": 3, "peak_mb": 40}

    def test_variants_take_turns_after_a_round_that_does_not_count(self):
        from measure import race

        calls = []
        variants = {name: lambda name=name: calls.append(name) for name in "ab"}
        times = race(variants, runs=2, repeats={"b": 3})
        assert "".join(calls) == "ab" + "abbb" * 2
        assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}

    def test_what_an_action_measures_itself_counts(self):
        from measure import Seconds, race

        given = iter([Seconds(7), Seconds(2), Seconds(4), Seconds(1), Seconds(3)])
        assert race({"a": lambda: next(given)}, runs=2, repeats={"a": 2}) == {"a": [3.0, 2.0]}

    def test_a_ratio_is_the_median_of_the_rounds(self):
        from measure import comparison

        found = comparison([8.0, 9.0, 10.0], [2.0, 1.0, 5.0])  # 4, 9, 2
        assert (found.ratio, found.low, found.high, found.runs) == (4.0, 2.0, 9.0, 3)
        assert (found.slow_seconds, found.fast_seconds) == (9.0, 2.0)

    def test_an_overhead_is_the_median_of_the_rounds(self):
        from measure import overhead

        found = overhead([2.0, 4.0, 5.0], [3.0, 5.0, 4.0])  # 50, 25 and -20 % longer
        assert (found.overhead_percent, found.low, found.high, found.runs) == (25.0, -20.0, 50.0, 3)
        assert (found.base_seconds, found.seconds) == (4.0, 4.0)

    def test_the_clocks_of_a_pass_give_their_medians_and_what_is_left(self, monkeypatch):
        import stages
        from hsp_sam import median_stages

        seconds = defaultdict(float)
        now = iter(range(10**6))
        monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: next(now)))
        part = stages.timed(lambda: None, "part", seconds)  # 1 of the clock's seconds
        found = median_stages(lambda: (part(), part()), seconds, runs=3)
        assert found == {"part": 2, "all else": 3, "total": 5}

    def test_different_functions_are_not_compared(self):
        from variants import require_equal

        reference = torch.tensor([1.0, -4.0])
        require_equal(reference, [torch.tensor([1.0, -4.003])], tolerance=1e-3)
        with pytest.raises(RuntimeError, match=r"to 0.001, got 0\.0025: nothing was measured"):
            require_equal(reference, [reference, torch.tensor([1.0, -4.01])], tolerance=1e-3)
        with pytest.raises(RuntimeError, match="got nan"):
            require_equal(reference, [reference * torch.nan], tolerance=1e-3)

    def test_the_times_of_imports_are_summed_by_package(self):
        from inferring import imports_of

        reported = b"""import time: self [us] | cumulative | imported package
import time:    500000 |     500000 |     torch._C
import time:   1000000 |    1500000 |   torch
import time:     20000 |      20000 | json
import time:      5000 |      25000 |   re
a warning in between
"""
        assert imports_of(reported) == pytest.approx(
            {"importing torch": 1.5, "importing Python's own": 0.025, "importing other packages": 0}
        )


class TestVolumes:
    def test_a_volume_has_the_distinct_slices_asked_for(self, tmp_path):
        import nibabel
        from inferring import write_volume

        image = nibabel.load(write_volume(tmp_path / "v.nii.gz", (24, 20, 7), distinct=3))
        voxels = image.get_fdata()
        assert voxels.shape == (24, 20, 7)
        assert nibabel.aff2axcodes(image.affine) == ("P", "L", "S")
        assert len({voxels[..., place].tobytes() for place in range(7)}) == 3

    def test_maps_that_differ_are_refused(self, tmp_path):
        import nibabel
        import numpy as np
        from inferring import smallest_dice

        maps = [np.zeros((20, 10, 10), dtype=np.uint8) for _ in range(3)]
        maps[0][:10], maps[1][:10] = 1, 1
        maps[1][4, 4, 4] = 0
        paths = [tmp_path / f"{number}.nii.gz" for number in range(3)]
        for values, path in zip(maps, paths, strict=True):
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
        assert smallest_dice(paths[0], paths[0]) == 1.0
        assert smallest_dice(paths[0], paths[1]) == pytest.approx(2 * 999 / 1999)
        for pair in (paths[0], paths[2]), (paths[2], paths[2]):
            with pytest.raises(RuntimeError, match="should agree"):
                smallest_dice(*pair)


class TestPage:
    def test_the_page_is_what_the_results_make_of_it(self, bundle_root):
        from render import read_results, render

        page = (bundle_root / "docs" / "performance.md").read_text(encoding="utf-8")
        assert page == render(read_results(FOLDER / "results")), "run `python benchmarks/render.py`"

    @pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
    def test_a_result_has_every_field(self, path):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert set(result) >= EVERY_ROW
        assert result["name"] == path.stem
        figure = next(key for key in ("ratio", "overhead_percent", "seconds") if key in result)
        assert result["low"] <= result[figure] <= result["high"]
        assert (FOLDER / result["command"].split()[1].removeprefix("benchmarks/")).is_file()

    def test_a_target_that_is_missed_shows(self):
        from render import render

        origin = {"command": "python benchmarks/x.py", "machine": "m", "versions": {"torch": "2"}, "runs": 1}
        ratio = {**origin, "low": 1, "high": 3, "slow_seconds": 4.0, "fast_seconds": 2.0, "peak_mb": 7, "target": 2.5}
        process = {**origin, "low": 9, "high": 9, "seconds": 9, "peak_mb": 50}
        overhead = {**origin, "low": 29, "high": 37, "base_seconds": 1.0, "seconds": 1.36}
        overhead |= {"base_peak_mb": 60, "peak_mb": 70}
        page = render(
            {
                "encoder_sam_vit_b_1024_torch": {**ratio, "ratio": 2.0, "slow_peak_mb": 8},
                "encoder_sam_vit_b_1024_onnx": {**ratio, "ratio": 2.5},
                "infer_large_volume": {**process, "limit": "40 MB"},
                "infer_first_slice": {**process, "limit": "12 s"},
                "hsp_sam_forward_sam_vit_b_512": {**overhead, "overhead_percent": 36.0, "limit": "35 %"},
                "hsp_sam_training_memory_sam_vit_b_512": {**overhead, "overhead_percent": 30.0},
            }
        )
        assert "| **2** (1 to 3; 1 run) | 2.5, not reached | 4 → 2 | 8 → 7 |" in page
        assert "| **2.5** (1 to 3; 1 run) | 2.5 | 4 → 2 | 7 |" in page
        assert "| below 40 MB, exceeded | 9 (9 to 9; 1 run) | 50 |" in page
        assert "| below 12 s | 9 (9 to 9; 1 run) | 50 |" in page
        assert "| **36 %** (29 to 37; 1 run) | below 35 %, exceeded | 1 → 1.36 | 60 → 70 |" in page
        assert "| **30 %** (29 to 37; 1 run) | - | 1 → 1.36 | 60 → 70 |" in page
        assert "| LiteMedSAM's TinyViT, 256 px, PyTorch | LiteMedSAM's eager form | not measured yet |" in page
        assert "no GPU was at hand" in page

    def test_a_result_without_a_place_is_not_passed_over(self):
        from render import render

        with pytest.raises(KeyError, match="no section of the page takes something_else"):
            render({"something_else": {"name": "something_else"}})


def run_small(script, folder):
    """Run a benchmark at its tiny size and read what it wrote."""
    from render import read_results

    command = [sys.executable, str(FOLDER / script), "--small", "--runs", "1", "--results", str(folder)]
    subprocess.run(command, check=True, cwd=FOLDER.parent, stdout=subprocess.DEVNULL)
    return read_results(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "rows"),
    [
        (
            "encoders.py",
            {f"encoder_{size}_{way}" for size in ("sam_vit_b_64", "lite_medsam_32") for way in ("torch", "onnx")},
        ),
        ("whole_slice.py", {"whole_slice_torch", "whole_slice_onnx"}),
        ("exports.py", {"exports_onnx", "exports_pt2"}),
        (
            "encoding_once.py",
            {"forward_diffusion", "training_from_store_sam_vit_b_32", "training_from_store_lite_medsam_32"},
        ),
        ("inferring.py", {"infer_volume_torch", "infer_volume_onnx", "infer_large_volume", "infer_first_slice"}),
        ("hsp_sam.py", {"hsp_sam_forward_sam_vit_b_64", "hsp_sam_training_memory_sam_vit_b_64"}),
        ("preparing.py", {"prepare_large_ct"}),
    ],
)
def test_a_benchmark_runs_and_writes_its_rows(script, rows, tmp_path):
    from render import render

    results = run_small(script, tmp_path)
    assert set(results) == rows
    for result in results.values():
        assert set(result) >= EVERY_ROW
        assert ("ratio" in result) == ("slow_peak_mb" in result) == ("fast_seconds" in result)
        assert ("overhead_percent" in result) == ("base_peak_mb" in result) == ("base_seconds" in result)
    assert all(f"`{name}`" in render(results) for name in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    assert run_small("gpu.py", tmp_path / "results") == {}


@pytest.mark.slow
def test_a_large_volume_is_prepared_within_three_gigabytes(bundle_root, monkeypatch, tmp_path):
    from measure import run_process
    from preparing import make_large_volume

    monkeypatch.chdir(bundle_root)
    source = tmp_path / "source"
    source.mkdir()
    make_large_volume(source)
    words = ["abdomenct1k", "--source", str(source), "--output", str(tmp_path / "out"), "--fractions", "1,0,0"]
    run = run_process([sys.executable, "-m", "scripts", "prepare", *words, "--noprogress_bar"])
    assert run.peak_mb < MEMORY_LIMIT
