"""Two processes do what one process does with the same global batch.

What may differ is the order in which float32 numbers are summed: by 1e-7 of a loss, far below the tolerances here.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ignite import distributed as idist
from monai.bundle import ConfigParser
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from scripts.data.phantoms import write_phantoms
from scripts.engines.handlers import JointLossHandler
from scripts.losses.joint import JointLoss, PromptTargets
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import save_state_dict
from scripts.networks.prompts import MaskPrediction, PromptEmbeddings

GLOBAL_BATCH = 4
RELATIVE = 1e-4  # of a loss or a score
ABSOLUTE = 1e-5  # of a weight, where one step may move it by 5e-4
SECONDS_AT_MOST = 300
# Far above AdamW's usual 1e-8, which hides how long a gradient is and turns rounding into whole steps.
NETWORK = {"image_size": 32, "channels": [8, 8, 8], "diffusion_steps": 10}
TRAINING = {"max_epochs": 2, "absent_share": 0.5, "gradient_clipping": 1.0, "optimizer#eps": 0.01, **NETWORK}


# The loss, without the bundle: seconds.


class ToyNetwork(nn.Module):
    """Gives a prediction that depends on all of its three parameters, one prompt an image."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.tokens = nn.Parameter(torch.linspace(-1, 1, 6).reshape(1, 2, 3))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, image):
        """Take `(B, 1, S, S)`."""
        dense = self.gain * image.expand(-1, 3, -1, -1)
        prompts = PromptEmbeddings(self.tokens * image.mean(dim=(2, 3)).unsqueeze(2), dense)
        teacher = PromptEmbeddings(torch.ones_like(prompts.sparse), torch.zeros_like(dense))
        return MaskPrediction(self.gain * image, image.new_zeros(len(image), 1), prompts, teacher)


def toy_batch(present):
    """Make `(B, 1, 8, 8)` images with targets, some of which are empty."""
    generator = torch.Generator().manual_seed(7)
    image = torch.randn((len(present), 1, 8, 8), generator=generator)
    there = torch.tensor(present).unsqueeze(1)
    mask = (image > 0.2).float() * there.reshape(-1, 1, 1, 1)
    return image, PromptTargets(mask, 0.7 * mask, there)


def toy_step(network, loss, batch, synchronise):
    """Go backwards once, and give all gradients and parts of the loss."""
    image, targets = batch
    value = loss(network(image), targets)
    value.backward()
    synchronise(SimpleNamespace())
    toy = getattr(network, "module", network)
    gradients = {"gain": toy.gain.grad, "tokens": toy.tokens.grad, "unused": toy.unused.grad, "lambda": loss.weights.grad}
    return gradients, {"loss": value.detach(), **loss.components}


def run_rank(rank, folder, present):
    """Do one rank's half of the batch: every second image, as DistributedSampler shares them out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ["LOCAL_RANK"] = str(rank)
    idist.sync()
    image, targets = toy_batch(present)
    half = image[rank::2], PromptTargets(*(target[rank::2] for target in targets))
    loss = JointLoss()
    network = DistributedDataParallel(ToyNetwork(), find_unused_parameters=True)
    handler = JointLossHandler(loss, output_dir=folder, tensorboard=False)
    gradients, parts = toy_step(network, loss, half, handler.synchronise)
    logged = handler._values(parts["loss"])
    torch.save({"gradients": gradients, "logged": logged}, folder / f"{rank}.pt")
    idist.finalize()


@pytest.mark.parametrize(
    "present",
    [
        pytest.param([True, False, True, False, True, True], id="three-and-one"),
        pytest.param([True, False, True, False, True, False], id="all-in-one-rank"),
        pytest.param([False] * 6, id="none-at-all"),
    ],
)
def test_gradients_and_losses_are_those_of_the_global_batch(tmp_path, present):
    loss = JointLoss()
    expected, parts = toy_step(ToyNetwork(), loss, toy_batch(present), lambda engine: None)
    torch.multiprocessing.spawn(run_rank, args=(tmp_path, present), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert expected["unused"] is None
        assert found["gradients"].pop("unused") is None, "weight decay must not shrink what does not learn"
        for name, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], rtol=RELATIVE, atol=1e-7)
        for name, value in parts.items():
            assert found["logged"][name] == pytest.approx(float(value), rel=RELATIVE), name


# The configs, read only.


OVERLAYS = {"multi_gpu_train": ["train"], "multi_gpu_evaluate": ["train", "evaluate"]}
ADDED = {"_about_", "+imports", "validate#sampler", "validate#dataloader#sampler"}


def read_config(bundle_root, *names):
    """Read configs laid over each other."""
    return ConfigParser.load_config_files([str(bundle_root / "configs" / f"{name}.json") for name in names])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_replaces_only_what_the_main_config_has(bundle_root, overlay):
    base = ConfigParser(read_config(bundle_root, *OVERLAYS[overlay]))
    changes = json.loads((bundle_root / "configs" / f"{overlay}.json").read_text())
    assert ADDED - set(changes) == set()
    assert [key for key in changes if key not in ADDED and key not in base] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("step", ["imports", "initialize", "run", "finalize"])
def test_overlay_keeps_the_main_configs_steps_in_order(bundle_root, overlay, step):
    base = read_config(bundle_root, *OVERLAYS[overlay])[step]
    merged = read_config(bundle_root, *OVERLAYS[overlay], overlay)[step]
    assert [line for line in merged if line in base] == base


# The bundle.


class Outcome(NamedTuple):
    """What a run left behind."""

    status: int
    text: str
    folder: Path


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Five cases with an untrained network; the second of the three test cases cannot be read."""
    folder = tmp_path_factory.mktemp("multi_process")
    write_phantoms(folder, training=2, validation=1, test=3, size=32, slices=12)
    (folder / "images" / "phantom_004.nii.gz").write_bytes(b"")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoMedSAM(image_encoder="compact", **NETWORK)
    save_state_dict(network.state_dict(), folder / "start.pt")
    return folder


def run_bundle(bundle_root, phantoms, output_dir, run_id, configs, *, processes, **settings):
    """Run `python -m monai.bundle run`, through torchrun where there are several processes."""
    files = [str(bundle_root / "configs" / f"{name}.json") for name in configs]
    settings |= {"bundle_root": bundle_root, "dataset_dir": phantoms, "output_dir": output_dir}
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "monai.bundle", "run", run_id, "--config_file", str(files)]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        command,
        cwd=output_dir.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        text, _ = process.communicate(timeout=SECONDS_AT_MOST)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes too
        text, _ = process.communicate()
        pytest.fail(f"no end after {SECONDS_AT_MOST} s: {text[-3000:]}")
    return Outcome(process.returncode, text, output_dir)


def read_table(path):
    """Read a CSV file of numbers; empty cells become NaN."""
    with open(path, newline="") as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trainings(bundle_root, phantoms, tmp_path_factory):
    """Train with one process and with two, two epochs of six iterations."""
    folder = tmp_path_factory.mktemp("training")
    outcomes = []
    for processes, configs in ((1, ["train"]), (2, ["train", "multi_gpu_train"])):
        outcome = run_bundle(
            bundle_root,
            phantoms,
            folder / str(processes),
            "training",
            configs,
            processes=processes,
            pretrained=phantoms / "start.pt",
            batch_size=GLOBAL_BATCH // processes,
            **TRAINING,
        )
        assert outcome.status == 0, outcome.text[-3000:]
        outcomes.append(outcome)
    return outcomes


def present_prompts_per_rank(bundle_root, phantoms):
    """Count the present prompts of each batch of the first epoch, for each of two ranks."""
    parser = ConfigParser(read_config(bundle_root, "train"))
    parser.update({"bundle_root": str(bundle_root), "dataset_dir": str(phantoms), **TRAINING})
    dataset = parser.get_parsed_content("train#dataset")
    dataset.set_epoch(1)
    counts = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=0)
        sampler.set_epoch(1)
        present = torch.tensor([int(dataset[index]["present"].sum()) for index in sampler])
        counts.append(present.reshape(-1, GLOBAL_BATCH // 2).sum(dim=1).tolist())
    return counts


@pytest.mark.slow
def test_ranks_have_different_numbers_of_present_prompts(bundle_root, phantoms):
    first, second = present_prompts_per_rank(bundle_root, phantoms)
    assert len(first) == len(second) == 6, "the batches of both ranks together are those of one process"
    assert any(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["losses.csv", "epochs.csv"])
def test_two_processes_log_what_one_does(trainings, table):
    one, two = (read_table(outcome.folder / table) for outcome in trainings)
    assert len(one) == len(two) == {"losses.csv": 12, "epochs.csv": 2}[table]
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=RELATIVE, abs=1e-7, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["network", "loss"])
def test_two_processes_learn_what_one_does(trainings, phantoms, part):
    one, two = (torch.load(outcome.folder / "last.pt", weights_only=True) for outcome in trainings)
    start = torch.load(phantoms / "start.pt", weights_only=True) if part == "network" else {"weights": torch.ones(5)}
    assert list(one[part]) == list(two[part])
    moved = max(float((one[part][name] - tensor).abs().max()) for name, tensor in start.items())
    assert moved > 100 * ABSOLUTE, "a network that stands still proves nothing"
    for name, tensor in one[part].items():
        torch.testing.assert_close(two[part][name], tensor, rtol=0, atol=ABSOLUTE, msg=lambda text, name=name: name + text)


@pytest.mark.slow
def test_only_one_process_writes_and_logs(trainings):
    one, two = (sorted(path.suffix or path.name for path in outcome.folder.iterdir()) for outcome in trainings)
    kinds = [[name if name in (".csv", ".pt", ".json") else "events" for name in names] for names in (one, two)]
    assert sorted(kinds[0]) == sorted(kinds[1])
    for text in ("INFO best network", "INFO loaded weights from start.pt", "INFO Epoch[2] Complete"):
        assert trainings[1].text.count(text) == trainings[0].text.count(text) > 0


@pytest.mark.slow
def test_two_processes_score_what_one_does_and_tell_of_failures_in_either(bundle_root, phantoms, tmp_path):
    configs = ["train", "evaluate"]
    one, two = (
        run_bundle(
            bundle_root,
            phantoms,
            tmp_path / str(processes),
            "evaluating",
            [*configs, "multi_gpu_evaluate"][: len(configs) + processes - 1],
            processes=processes,
            checkpoint=phantoms / "start.pt",
            **NETWORK,
        )
        for processes in (1, 2)
    )
    assert (two.folder / "metrics.csv").read_bytes() == (one.folder / "metrics.csv").read_bytes()
    assert (two.folder / "metrics.json").read_bytes() == (one.folder / "metrics.json").read_bytes()
    rows = list(csv.DictReader((two.folder / "metrics.csv").read_text().splitlines()))
    assert {row["case"] for row in rows} == {"phantom_003", "phantom_005"}
    assert any(float(row["dsc"] or 0) > 0 for row in rows), "empty predictions prove nothing"
    for outcome in (one, two):
        assert outcome.status != 0
        assert "1 of 3 cases failed: phantom_004" in outcome.text
        assert outcome.text.count('Protocol "all"') == 1


@pytest.mark.slow
def test_one_process_that_dies_ends_the_other(bundle_root, phantoms, tmp_path):
    outcome = run_bundle(
        bundle_root,
        phantoms,
        tmp_path / "died",
        "training",
        ["train", "multi_gpu_train"],
        processes=2,
        **{"run#0": "$@train#trainer.run() if idist.get_rank() == 0 else 1 / 0", **TRAINING},
    )
    assert outcome.status != 0
    assert "ZeroDivisionError" in outcome.text
