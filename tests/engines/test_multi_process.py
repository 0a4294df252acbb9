"""Two processes do what one process does with the same global batch.

What may differ is the order in which float32 numbers are summed: by 1e-7 of a loss, far below the tolerances here.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
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
NETWORK = {"image_size": 32, "channels": [8, 8, 8], "diffusion_steps": 10, "class_code": "scalar"}
TRAINING = {"max_epochs": 2, "absent_share": 0.5, "gradient_clipping": 1.0, "optimizer#eps": 0.01, **NETWORK}


# The loss, without the bundle: seconds.


class ToyNetwork(nn.Module):
    """One prompt an image; like the real network, it also gives a quality that no loss looks at."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.tokens = nn.Parameter(torch.linspace(-1, 1, 6).reshape(1, 2, 3))
        self.judgement = nn.Parameter(torch.ones(1))

    def forward(self, image):
        """Take `(B, 1, S, S)`."""
        dense = self.gain * image.expand(-1, 3, -1, -1)
        prompts = PromptEmbeddings(self.tokens * image.mean(dim=(2, 3)).unsqueeze(2), dense)
        teacher = PromptEmbeddings(torch.ones_like(prompts.sparse), torch.zeros_like(dense))
        return MaskPrediction(self.gain * image, self.judgement * image.mean(dim=(2, 3)), prompts, teacher)


# Which of six images have their class; a rank takes every second one.
PRESENT = {
    "three_and_one": [True, False, True, False, True, True],
    "all_in_one_rank": [True, False, True, False, True, False],
    "none_at_all": [False] * 6,
}


def toy_batch(present):
    """Make `(B, 1, 8, 8)` images with targets, some of which are empty."""
    image = torch.randn((len(present), 1, 8, 8), generator=torch.Generator().manual_seed(7))
    there = torch.tensor(present).unsqueeze(1)
    mask = (image > 0.2).float() * there.reshape(-1, 1, 1, 1)
    return image, PromptTargets(mask, 0.7 * mask, there)


def toy_step(network, image, targets, output_dir):
    """Go backwards once: the gradients of network and loss weights, and what is logged."""
    loss = JointLoss()
    handler = JointLossHandler(loss, output_dir=output_dir, tensorboard=False)
    value = loss(network(image), targets)
    value.backward()
    engine = SimpleNamespace(state=SimpleNamespace(epoch=1, iteration=1, output={"loss": value}))
    handler.synchronise(engine)
    handler.record(engine)
    toy = getattr(network, "module", network)
    gradients = {name: parameter.grad for name, parameter in toy.named_parameters()}
    return {"gradients": gradients | {"lambda": loss.weights.grad}, "logged": handler.sums}


def run_rank(rank, folder):
    """Do one rank's half of each batch."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    idist.sync()
    found = {}
    for name, present in PRESENT.items():
        image, targets = toy_batch(present)
        half = PromptTargets(*(target[rank::2] for target in targets))
        network = DistributedDataParallel(ToyNetwork(), find_unused_parameters=True)
        found[name] = toy_step(network, image[rank::2], half, folder)
    torch.save(found, folder / f"{rank}.pt")
    idist.finalize()


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", PRESENT)
def test_gradients_and_losses_are_those_of_the_global_batch(halves, tmp_path, name, rank):
    expected = toy_step(ToyNetwork(), *toy_batch(PRESENT[name]), tmp_path)
    found = halves[rank][name]
    assert found["logged"] == pytest.approx(expected["logged"], rel=RELATIVE)
    assert list(found["gradients"]) == ["gain", "tokens", "judgement", "lambda"]
    for parameter, gradient in expected["gradients"].items():
        if parameter == "judgement":  # a gradient of zeros would let weight decay shrink what does not learn
            assert gradient is None
            assert found["gradients"][parameter] is None
        else:
            torch.testing.assert_close(found["gradients"][parameter], gradient, rtol=RELATIVE, atol=1e-7)


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
    """What a run left behind; `ranks` is what each process printed."""

    status: int
    text: str
    folder: Path
    ranks: list[str]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Eight cases with an untrained network; the second of the five test cases cannot be read."""
    folder = tmp_path_factory.mktemp("multi_process")
    write_phantoms(folder, training=2, validation=1, test=5, size=32, slices=12)
    (folder / "images" / "phantom_004.nii.gz").write_bytes(b"")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoMedSAM(image_encoder="compact", **NETWORK)
    save_state_dict(network.state_dict(), folder / "start.pt")
    return folder


def run_bundle(bundle_root, phantoms, output_dir, run_id, configs, *, processes, **settings):
    """Run `python -m monai.bundle run`, through torchrun where there are several processes."""
    files = [str(bundle_root / "configs" / f"{name}.json") for name in configs]
    # A folder for each process, so that it shows who writes; one process alone never imports idist.
    folder = f"$'{output_dir}/' + str(idist.get_rank())" if processes > 1 else output_dir / "0"
    settings |= {"bundle_root": bundle_root, "dataset_dir": phantoms, "output_dir": folder}
    logs = output_dir.with_suffix(".logs")
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun += ["--tee", "3", "--log-dir", str(logs), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "monai.bundle", "run", run_id]
    command += ["--config_file", str(files)]
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
    by_rank = ["".join(path.read_text() for path in logs.glob(f"*/*/{rank}/*.log")) for rank in range(processes)]
    return Outcome(process.returncode, text, output_dir / "0", by_rank if processes > 1 else [text])


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
        difference = float((two[part][name] - tensor).abs().max())
        assert difference < ABSOLUTE, name


@pytest.mark.slow
def test_only_one_process_writes(trainings):
    one, two = (
        Counter("events" if "tfevents" in path.name else path.name for path in outcome.folder.iterdir())
        for outcome in trainings
    )
    assert one == two
    assert one["events"] > 0
    assert [folder.name for folder in trainings[1].folder.parent.iterdir()] == ["0"]


@pytest.mark.slow
def test_only_one_process_logs(trainings):
    (one,), (first, second) = (outcome.ranks for outcome in trainings)
    for text in ("INFO best network", "INFO loaded weights from start.pt", "INFO Epoch[2] Complete", "training [2/2]"):
        assert text in one
        assert text in first
        assert text not in second


@pytest.fixture(scope="module")
def evaluations(bundle_root, phantoms, tmp_path_factory):
    """Evaluate with one process and with two, one of which gets a case a second time to fill up its share."""
    folder = tmp_path_factory.mktemp("evaluation")
    return [
        run_bundle(
            bundle_root,
            phantoms,
            folder / str(processes),
            "evaluating",
            configs,
            processes=processes,
            checkpoint=phantoms / "start.pt",
            error_pictures=False,  # every process draws its own cases, into the one folder of a real run
            **NETWORK,
        )
        for processes, configs in ((1, ["train", "evaluate"]), (2, ["train", "evaluate", "multi_gpu_evaluate"]))
    ]


@pytest.mark.slow
def test_two_processes_score_what_one_does(evaluations):
    one, two = evaluations
    for name in ("metrics.csv", "summary.json"):
        assert (two.folder / name).read_bytes() == (one.folder / name).read_bytes()
    rows = list(csv.DictReader((two.folder / "metrics.csv").read_text().splitlines()))
    assert {row["case"] for row in rows} == {"phantom_003", "phantom_005", "phantom_006", "phantom_007"}
    assert any(float(row["dsc"] or 0) > 0 for row in rows), "empty predictions prove nothing"
    assert [folder.name for folder in two.folder.parent.iterdir()] == ["0"]
    assert two.text.count('Protocol "all"') == one.text.count('Protocol "all"') == 1


@pytest.mark.slow
def test_two_processes_share_the_cases_out(evaluations):
    counts = [set(re.findall(r"evaluating: \[\d/(\d)\]", text)) for outcome in evaluations for text in outcome.ranks]
    assert counts == [{"5"}, {"3"}, set()]


@pytest.mark.slow
def test_every_process_tells_of_a_case_that_failed_in_one(evaluations):
    for outcome in evaluations:
        assert outcome.status != 0
        assert all("1 of 5 cases failed: phantom_004" in text for text in outcome.ranks)


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
