"""The bundle as MONAI's own commands see it: its files, its configs, and what `monai.bundle` makes of them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import ignite.distributed as idist
import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism
from PIL import Image

from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import read_state_dict
from scripts.networks.model_card import ModelCard

BUNDLE_ROOT = Path(__file__).resolve().parents[1]
CONFIGS = BUNDLE_ROOT / "configs"
MAIN_CONFIGS = ["train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate"]
OVERLAYS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml"))
LARGEST_FILE = 25 * 1024 * 1024  # bytes, the model zoo's limit for a file in git
TINY = {
    "image_size": 32,
    "channels": [8, 16, 32],
    "max_epochs": 1,
    "batch_size": 8,
    "pretrained": None,
    "train_image_encoder": True,
    "tensorboard": False,
    "progress_bar": False,
}


@pytest.fixture(autouse=True)
def random_state():
    """Training seeds every generator; the other tests should not notice."""
    yield
    set_determinism(seed=None)


@pytest.fixture
def offline(monkeypatch):
    """Let every attempt to reach another machine fail."""

    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def workflow(*configs, kind, **settings):
    return ConfigWorkflow(
        config_file=[str(CONFIGS / config) for config in configs],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(BUNDLE_ROOT),
        **settings,
    )


def of_datalist(datalist, output):
    return {"datalist": str(datalist), "dataset_dir": str(datalist.parent), "output_dir": str(output)}


def monai_bundle(*words, cwd):
    """Run one of MONAI's commands as a person would."""
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "monai.bundle", *(str(word) for word in words)]
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def as_options(settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


# ----------------------------------------------------------------------------------------------------- the zoo's checks


def test_metadata_is_verified_offline(bundle_root, tmp_path, offline):
    schema = tmp_path / "schema.json"
    shutil.copy(bundle_root / "tests" / "data_files" / "meta_schema.json", schema)
    monai.bundle.verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))


def test_network_takes_and_gives_what_the_metadata_says(offline):
    monai.bundle.verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        device="cpu",
    )


def test_training_has_every_property(tiny_phantoms, tmp_path):
    flow = workflow("train.json", kind="train", **TINY, **of_datalist(tiny_phantoms, tmp_path))
    flow.initialize()
    assert flow.check_properties() == []


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_evaluation_has_every_property(tiny_phantoms, tmp_path, kind):
    flow = workflow("train.json", "evaluate.json", kind=kind, **TINY, **of_datalist(tiny_phantoms, tmp_path))
    flow.initialize()
    assert flow.check_properties() == []


def test_inference_has_every_property(tiny_phantoms, tmp_path):
    place = {"dataset_dir": str(tiny_phantoms.parent / "images"), "output_dir": str(tmp_path)}
    flow = workflow("inference.json", kind="infer", **place)
    flow.initialize()
    assert flow.check_properties() == []


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells the only process of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield
    idist.finalize()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_multi_gpu_training_has_every_property_and_runs(tiny_phantoms, tmp_path, one_process):
    settings = {**TINY, **of_datalist(tiny_phantoms, tmp_path), "device": torch.device("cpu")}
    flow = workflow("train.json", "multi_gpu_train.json", kind="train", **settings)
    flow.initialize()
    assert torch.distributed.is_initialized()
    assert flow.check_properties() == []
    assert isinstance(flow.parser.get_parsed_content("network"), torch.nn.parallel.DistributedDataParallel)
    flow.run()
    flow.finalize()
    assert (tmp_path / "model.pt").is_file()


def test_multi_gpu_evaluation_has_every_property(tiny_phantoms, tmp_path, one_process):
    settings = {**TINY, **of_datalist(tiny_phantoms, tmp_path), "device": torch.device("cpu")}
    flow = workflow("train.json", "evaluate.json", "multi_gpu_evaluate.json", kind="train", **settings)
    flow.initialize()
    assert flow.check_properties() == []


# --------------------------------------------------------------------------------------------- every config runs once


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_phantoms):
    """A run of train.json by MONAI's command, from the root of the bundle: the defaults, for one epoch."""
    output = tmp_path_factory.mktemp("train")
    settings = {"dataset_dir": tiny_phantoms.parent, "output_dir": output, "max_epochs": 1, "progress_bar": False}
    monai_bundle("run", "training", "--config_file", "configs/train.json", *as_options(settings), cwd=BUNDLE_ROOT)
    return output


def test_training_runs_from_the_root_of_the_bundle(trained):
    written = {path.name.split(".out.")[0] for path in trained.iterdir()}
    assert written == {"model.pt", "model.json", "last.pt", "losses.csv", "epochs.csv", "events"}
    assert json.loads((trained / "model.json").read_text())["training"]["epoch"] == 1


def test_training_leaves_the_shipped_model_alone(trained, bundle_root):
    frozen = [name for name in read_state_dict(trained / "model.pt") if name.startswith("image_encoder.")]
    learned, shipped = (read_state_dict(path / "model.pt") for path in (trained, bundle_root / "models"))
    assert frozen
    assert all(torch.equal(learned[name], shipped[name].to(learned[name].dtype)) for name in frozen)
    assert any(not torch.equal(learned[name], shipped[name].to(learned[name].dtype)) for name in learned)


def test_evaluating_runs_from_any_folder(trained, tiny_phantoms, tmp_path):
    files = [str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")]
    settings = {"bundle_root": BUNDLE_ROOT, "dataset_dir": tiny_phantoms.parent, "output_dir": tmp_path / "scores"}
    settings["checkpoint"] = trained / "model.pt"
    done = monai_bundle("run", "evaluating", "--config_file", str(files), *as_options(settings), cwd=tmp_path)
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["protocol"] == "all"
    assert len(summary["units"]["mm"]["classes"]) == 5
    assert 'Protocol "all"' in done.stdout  # as logging.conf has it


def test_inference_runs_from_any_folder(phantom_bundle, tiny_phantoms, tmp_path):
    """Nothing but the image, its modality and the output folder has to be told."""
    image = tiny_phantoms.parent / "images" / "phantom_004.nii.gz"
    settings = {"bundle_root": phantom_bundle, "dataset_dir": image, "modality": "CT", "output_dir": tmp_path / "out"}
    config = phantom_bundle / "configs" / "inference.json"
    monai_bundle("run", "--config_file", config, *as_options(settings), cwd=tmp_path)
    labels, volume = nibabel.load(tmp_path / "out" / "phantom_004_seg.nii.gz"), nibabel.load(image)
    assert labels.shape == volume.shape
    assert np.allclose(labels.affine, volume.affine)
    assert 1 in np.unique(np.asarray(labels.dataobj))  # a liver of 30 pixels is found even at this size
    assert (tmp_path / "out" / "labels.json").is_file()


def test_the_shipped_model_finds_a_dark_spot_on_skin(tmp_path):
    """A drawing, so that this needs no data: an ellipse of 60 by 80 pixels in a picture of 200 by 260."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:200, :260]
    spot = ((rows - 90) / 30) ** 2 + ((columns - 140) / 40) ** 2 < 1
    colours = np.where(spot[..., None], (110, 70, 60), (215, 170, 150)) + rng.normal(0, 6, (200, 260, 3))
    Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(tmp_path / "spot.png")
    settings = {"bundle_root": BUNDLE_ROOT, "dataset_dir": tmp_path / "spot.png", "modality": "dermoscopy"}
    settings["output_dir"] = tmp_path / "out"
    monai_bundle("run", "--config_file", CONFIGS / "inference.json", *as_options(settings), cwd=tmp_path)
    with Image.open(tmp_path / "out" / "spot_seg.png") as picture:
        found = np.asarray(picture)
    assert found.shape == spot.shape
    assert set(np.unique(found)) == {0, 7}  # a skin lesion
    assert 2 * (spot & (found == 7)).sum() / (spot.sum() + (found == 7).sum()) > 0.8


def test_no_config_is_forgotten():
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == sorted([*MAIN_CONFIGS, "metadata"])
    assert {Path(overlay).parent.name for overlay in OVERLAYS} == {"networks", "datasets", "experiments"}


def overlay_settings(overlay):
    return yaml.safe_load((CONFIGS / overlay).read_text(encoding="utf-8"))


def beneath(overlay):
    """The overlays that have to lie below: the demo is a shorter training from nothing, HSP-SAM has smaller forms."""
    if overlay == "experiments/demo.yaml":
        return ["experiments/from_scratch.yaml", overlay]
    return [HSP_SAM, overlay] if overlay.startswith("networks/hsp_sam_") else [overlay]


HSP_SAM = "networks/hsp_sam.yaml"
# Those of data sets are trained with in test_datasets.py, each on files in its owner's layout.
HEAVY = [overlay for overlay in OVERLAYS if "sam_vit" in overlay]
LIGHT = [name for name in OVERLAYS if name not in (*HEAVY, HSP_SAM) and not name.startswith("datasets/")]


@pytest.mark.parametrize("overlay", LIGHT)
def test_overlay_trains_for_an_epoch(tiny_phantoms, tmp_path, overlay):
    settings = dict(TINY)
    if "channels" in overlay_settings(overlay):
        del settings["channels"]
    place = of_datalist(tiny_phantoms, tmp_path)
    flow = workflow("train.json", *beneath(overlay), kind="train", **{**settings, **place, "val_interval": 1})
    flow.initialize()
    flow.run()
    flow.finalize()
    network = json.loads((tmp_path / "model.json").read_text())["network"]
    given = {**overlay_settings(overlay), **settings}
    assert {name: value for name, value in network.items() if name in given} == {
        name: value for name, value in given.items() if name in network
    }


@pytest.mark.parametrize("overlay", HEAVY)
def test_overlay_of_a_large_network_builds(overlay):
    """Without memory for its numbers: only names and shapes."""
    parser = ConfigParser(ConfigParser.load_config_files([str(CONFIGS / "train.json"), str(CONFIGS / overlay)]))
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    count = sum(parameter.numel() for parameter in network.image_encoder.parameters())
    size = Path(overlay).stem.removeprefix("sam_").removeprefix("medsam_")
    # Of the published encoders, https://github.com/facebookresearch/segment-anything.
    assert round(count / 1e6) == {"vit_b": 90, "vit_l": 308, "vit_h": 637}[size]
    assert (network.image_size, network.grid_size) == (1024, 64)
    assert not any(parameter.requires_grad for parameter in network.image_encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [*(overlay for overlay in HEAVY if "vit_b" in overlay), HSP_SAM])
def test_overlay_of_a_large_network_trains(tiny_phantoms, tmp_path, overlay):
    place = of_datalist(tiny_phantoms, tmp_path)
    flow = workflow("train.json", overlay, kind="train", **{**TINY, **place, "image_size": 64, "batch_size": 4})
    flow.initialize()
    flow.run()
    flow.finalize()
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("networks/")])
def test_overlay_of_a_network_asks_for_published_weights_as_they_want_it(overlay):
    settings = {key: value for name in beneath(overlay) for key, value in overlay_settings(name).items()}
    if settings.get("pretrained") is None:
        return
    table = yaml.safe_load((CONFIGS / "weights.yaml").read_text(encoding="utf-8"))
    rows = [row for row in table.values() if f"/models/{row['file']}'" in settings["pretrained"]]
    # The first author of HSP-SAM takes no mean and deviation off, whatever the weights were trained with.
    pixels = ["unit" if "hsp_sam" in overlay else row["pixels"] for row in rows]
    assert [row["encoder"] for row in rows] == [settings["image_encoder"]]
    assert pixels == [settings["pixel_normalisation"]]
    assert settings["train_image_encoder"] is False


# ----------------------------------------------------------------------------------------------- what the configs hold


def merged(*names):
    return ConfigParser.load_config_files([str(CONFIGS / f"{name}.json") for name in names])


@pytest.mark.parametrize(
    ("configs", "further_name"),
    [
        (("train",), "training"),
        (("train", "evaluate"), "evaluating"),
        (("inference",), "evaluating"),
        (("train", "multi_gpu_train"), "training"),
        (("train", "evaluate", "multi_gpu_evaluate"), "evaluating"),
    ],
)
def test_every_workflow_has_its_three_steps(configs, further_name):
    config = merged(*configs)
    for step in ("initialize", "run", "finalize"):
        assert isinstance(config[step], list)
        assert config[step]
    assert config[further_name] == "@run"
    # Classes of the bundle are found from any folder, because `create_workflow` initialises before it runs.
    assert config["initialize"][0] == "$sys.path.insert(0, @bundle_root)"


@pytest.mark.parametrize("config", ["train", "inference"])
def test_network_is_built_without_a_weights_file(tmp_path, config):
    """MONAI's consumers build the network before they look for weights."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    parser = ConfigParser(ConfigParser.load_config_file(str(tmp_path / "configs" / f"{config}.json")))
    parser["bundle_root"] = str(tmp_path)
    assert isinstance(parser.get_parsed_content("network_def"), AutoMedSAM)


@pytest.mark.parametrize("config", ["train", "inference"])
def test_default_network_is_that_of_the_shipped_model(bundle_root, config):
    network = merged(config)
    card = ModelCard.beside(bundle_root / "models" / "model.pt")
    expected = {**card.settings, **card.learned} if config == "inference" else {**card.network, **card.preprocessing}
    if config == "train":  # any classes may be learned upon it; those of the phantoms are the default
        del expected["class_ids"]
    assert {name: network[name] for name in expected} == expected


@pytest.mark.parametrize("config", ["train", "inference"])
def test_handlers_are_plain_objects(config):
    """`check_properties` and MONAI Label look for `_target_` in each."""
    for handlers in (merged("train")["train"]["handlers"], merged("inference")["handlers"]):
        assert all(isinstance(handler, dict) and "_target_" in handler for handler in handlers)


def test_settings_of_the_paper_are_the_defaults_of_training():
    config = merged("train")
    assert (config["batch_size"], config["max_epochs"], config["learning_rate"]) == (16, 100, 5e-4)
    assert (config["optimizer"]["betas"], config["optimizer"]["eps"]) == ([0.9, 0.999], 1e-8)
    scheduler = config["lr_scheduler"]
    assert scheduler["_target_"] == "torch.optim.lr_scheduler.ReduceLROnPlateau"
    assert (scheduler["factor"], scheduler["patience"], scheduler["cooldown"]) == (0.9, 5, 0)
    assert config["preset"] == "paper"
    assert config["train_image_encoder"] is False
    assert config["presence"] == "all"


def test_configs_say_what_they_are_for():
    named = {name for names in merged("train")["_sources_"] for name in names.split(", ")}
    assert {"batch_size", "max_epochs", "learning_rate", "window", "box_growth"} <= named <= set(merged("train"))
    for name in ("evaluate", "multi_gpu_train", "multi_gpu_evaluate"):
        content = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
        assert "run evaluating" in content["_about_"] or "run training" in content["_about_"]
    for overlay in OVERLAYS:
        assert (CONFIGS / overlay).read_text(encoding="utf-8").startswith("# "), overlay


def test_no_config_knows_this_machine():
    for path in CONFIGS.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert str(BUNDLE_ROOT) not in text, path.name
            assert "/home/" not in text, path.name


# -------------------------------------------------------------------------------------------------- load and distribute


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bundle as a download leaves it: `automedsam` within a folder of bundles."""
    folder = tmp_path_factory.mktemp("bundles")
    for part in ("configs", "scripts", "models"):
        shutil.copytree(BUNDLE_ROOT / part, folder / "automedsam" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_load_gives_a_network_with_the_shipped_weights(installed, tmp_path, monkeypatch, offline, kind):
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load("automedsam", bundle_dir=str(installed), workflow_type=kind, device="cpu")
    assert isinstance(network, AutoMedSAM)
    weights = read_state_dict(installed / "automedsam" / "models" / "model.pt")
    found = network.state_dict()
    assert set(found) == set(weights)
    for name, value in weights.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_missing_weights_are_an_error_and_never_random_ones(tiny_phantoms, tmp_path):
    place = {"dataset_dir": str(tiny_phantoms.parent / "images"), "output_dir": str(tmp_path / "out")}
    flow = workflow("inference.json", kind="infer", **place, checkpoint=str(tmp_path / "gone.pt"), progress_bar=False)
    flow.initialize()
    with pytest.raises(RuntimeError) as caught:
        flow.run()
    assert "there is no weights file" in repr(caught.getrepr(chain=True))
    assert not (tmp_path / "out").exists()


def test_large_files_are_only_what_the_defaults_load(bundle_root):
    """MONAI downloads every row, whether somebody needs it or not."""
    rows = yaml.safe_load((bundle_root / "large_files.yml").read_text(encoding="utf-8"))["large_files"]
    assert {row["path"] for row in rows} <= {"models/model.pt"}


def test_no_file_in_git_is_too_large(bundle_root):
    if not (bundle_root / ".git").exists():
        pytest.skip("not a checkout of git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=bundle_root, capture_output=True, check=True).stdout
    paths = [bundle_root / os.fsdecode(name) for name in listed.split(b"\0") if name]
    assert paths
    assert [path.name for path in paths if path.is_file() and path.stat().st_size > LARGEST_FILE] == []
    assert [path.name for path in paths if path.suffix in (".nii", ".gz", ".jpg", ".dcm")] == []
