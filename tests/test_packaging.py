"""A bundle of a model of one's own: what is in it, and that it gives the masks that the model gives here."""

import json
import os
import shutil
import subprocess
import sys

import jsonschema
import monai.bundle
import nibabel
import numpy as np
import pytest
import safety
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism

from scripts import cli, packaging
from scripts.errors import CheckpointError, ConfigError, OutputError, PromptError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import read_state_dict, save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard
from scripts.packaging import package_model

HSP_SAM = {"image_encoder": "lite_medsam", "image_size": 32, "class_ids": [3, 1], "lora_rank": 2, "prompts": 1}
PHANTOM_CLASSES = {
    "0": "background",
    "1": "liver",
    "2": "spleen",
    "3": "pancreas",
    "4": "left kidney",
    "5": "right kidney",
}
TINY_CLASSES = {"0": "background", "1": "liver", "3": "pancreas"}
SHORT = {"max_epochs": 1, "batch_size": 8, "tensorboard": False, "progress_bar": False}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Configs put their bundle first among the places of modules, and training seeds every generator."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    set_determinism(seed=None)


def random_hsp_sam():
    """A network that nobody trained, with updates that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = HSPSAM(**HSP_SAM)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name.endswith("_up"):
                    value.normal_(std=0.1)
    return network


def write_model(folder, network, *, architecture, **card):
    settings = {"preprocessing": {"window": [50.0, 300.0]}, "trained": {"CT": ["liver", "pancreas"], "MR": ["liver"]}}
    folder.mkdir(parents=True, exist_ok=True)
    save_state_dict(network.state_dict(), folder / "model.pt")
    ModelCard(**{**settings, **card}, network=network.settings, architecture=architecture).write(folder / "model.json")
    return folder / "model.pt"


@pytest.fixture(scope="module")
def models(phantom_model, tmp_path_factory):
    """The model of the phantoms, and a tiny HSP-SAM."""
    training = {"datalist": ["first", "second"], "val_mean_dsc": 0.25, "epoch": 3, "seed": 0}
    own = tmp_path_factory.mktemp("model")
    return {
        "phantom": phantom_model,
        "hsp_sam": write_model(own, random_hsp_sam(), architecture="hsp_sam", training=training),
    }


@pytest.fixture(scope="module")
def bundles(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name, model in models.items():
        package_model(model, folder / name)
    return folder


def content_of(folder, name):
    return json.loads((folder / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def in_a_fresh_process(*words, cwd):
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def workflow(folder, *configs, kind, **settings):
    return ConfigWorkflow(
        config_file=[str(folder / "configs" / f"{config}.json") for config in configs],
        meta_file=str(folder / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(folder),
        **settings,
    )


# ---------------------------------------------------------------------------------------------------- what it gives


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_the_bundle_gives_the_label_map_of_the_model(bundles, models, tiny_phantoms, tmp_path, name):
    """Moved, by its own code, with MONAI's own command and nothing but the image and its modality."""
    image = tiny_phantoms.parent / "images" / "phantom_004.nii.gz"
    own, theirs, moved = (tmp_path / part for part in ("own", "theirs", "moved"))
    cli.infer(str(image), checkpoint=str(models[name]), modality="CT", output=str(own), progress_bar=False)
    shutil.copytree(bundles / name, moved)
    with (moved / "scripts" / "__init__.py").open("a") as code:
        code.write("print('by the code of the bundle')\n")
    words = ["--bundle_root", moved, "--dataset_dir", image, "--modality", "CT", "--output_dir", theirs]
    config = moved / "configs" / "inference.json"
    out = in_a_fresh_process("-m", "monai.bundle", "run", "--config_file", config, *words, cwd=tmp_path)
    assert "by the code of the bundle" in out
    files = [nibabel.load(folder / "phantom_004_seg.nii.gz") for folder in (own, theirs)]
    labels = [np.asarray(file.dataobj) for file in files]
    assert np.array_equal(*labels)
    assert np.array_equal(files[0].affine, files[1].affine)
    assert len(np.unique(labels[0])) > 1
    assert (own / "labels.json").read_text() == (theirs / "labels.json").read_text()


def test_load_gives_the_network_with_its_weights(bundles, tmp_path, monkeypatch):
    """LoRA's updates among them."""
    monkeypatch.chdir(tmp_path)
    arguments = {"bundle_dir": str(bundles), "workflow_type": "inference", "device": "cpu"}
    network = monai.bundle.load("hsp_sam", **arguments).eval()
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(image), random_hsp_sam().eval()(image))


@pytest.mark.parametrize(("name", "kind"), [("phantom", AutoMedSAM), ("hsp_sam", HSPSAM)])
def test_the_network_of_either_config_takes_the_weights(bundles, name, kind):
    """As MONAI Label and MONAI Deploy do it: one config, the network built without a file, then `load_state_dict`."""
    for config in ("inference", "train"):
        parser = ConfigParser()
        parser.read_config(str(bundles / name / "configs" / f"{config}.json"))
        parser.config["bundle_root"] = str(bundles / name)
        network = parser.get_parsed_content("network_def", instantiate=True)
        assert isinstance(network, kind)
        network.load_state_dict(torch.load(bundles / name / "models" / "model.pt", weights_only=True))


# -------------------------------------------------------------------------------------------------- what MONAI checks


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_monai_verifies_the_metadata(bundles, bundle_root, tmp_path, name):
    schema = tmp_path / "schema.json"
    shutil.copy(bundle_root / "tests" / "data_files" / "meta_schema.json", schema)
    configs = bundles / name / "configs"
    monai.bundle.verify_metadata(meta_file=str(configs / "metadata.json"), filepath=str(schema))
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
    monai.bundle.verify_net_in_out(net_id="network_def", device="cpu", **files)


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_every_workflow_has_every_property(bundles, tiny_phantoms, tmp_path, name):
    place = {"dataset_dir": str(tiny_phantoms.parent), "output_dir": str(tmp_path)}
    images = {**place, "dataset_dir": str(tiny_phantoms.parent / "images")}
    for configs, kind, settings in (
        (("inference",), "infer", images),
        (("train",), "train", {**SHORT, **place}),
        (("train", "evaluate"), "eval", {**SHORT, **place}),
    ):
        flow = workflow(bundles / name, *configs, kind=kind, **settings)
        flow.initialize()
        assert flow.check_properties() == [], configs


@pytest.mark.slow
def test_training_goes_on_from_the_model_and_evaluation_scores_it(bundles, tiny_phantoms, tmp_path):
    place = {"datalist": str(tiny_phantoms), "dataset_dir": str(tiny_phantoms.parent), "output_dir": str(tmp_path)}
    flow = workflow(bundles / "hsp_sam", "train", kind="train", **{**SHORT, **place})
    flow.initialize()
    flow.run()
    flow.finalize()
    card = ModelCard.beside(tmp_path / "model.pt")
    assert (card.architecture, card.network["lora_rank"], card.network["class_ids"]) == ("hsp_sam", 2, [3, 1])
    before, after = (read_state_dict(folder / "model.pt") for folder in (bundles / "hsp_sam" / "models", tmp_path))
    frozen = "image_encoder.layers.0.blocks.0.conv1.c.weight"
    assert torch.equal(before[frozen], after[frozen])
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("query_up" in name for name in changed)
    settings = {**SHORT, **place, "output_dir": str(tmp_path / "scores"), "error_pictures": False}
    flow = workflow(bundles / "hsp_sam", "train", "evaluate", kind="eval", **settings)
    flow.initialize()
    flow.run()
    flow.finalize()
    assert (tmp_path / "scores" / "summary.json").is_file()


# -------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_the_bundle_is_complete_and_has_nothing_of_others(bundles, bundle_root, name):
    found = {str(path.relative_to(bundles / name)) for path in (bundles / name).rglob("*") if path.is_file()}
    configs = {"train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate", "metadata"}
    assert {f"configs/{config}.json" for config in configs} <= found
    assert {"configs/logging.conf", "configs/classes.yaml", "configs/networks/hsp_sam.yaml"} <= found
    assert {"docs/README.md", "docs/data_license.txt", "LICENSE", "large_files.yml"} <= found
    models = {path for path in found if path.startswith("models/")}
    assert models == {"models/model.pt", "models/model.json", "models/model.safetensors"}
    code = {str(path.relative_to(bundle_root)) for path in (bundle_root / "scripts").rglob("*.py")}
    assert {path for path in found if path.startswith("scripts/")} == code
    assert not {"configs/layouts.yaml", "configs/npz_rules.yaml", "configs/experiments/tables/table_2.yaml"} & found
    assert yaml.safe_load((bundles / name / "large_files.yml").read_text()) == {"large_files": []}


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_weights_and_card_are_the_model_s(bundles, models, name):
    folder = bundles / name / "models"
    expected = read_state_dict(models[name])
    for file in ("model.pt", "model.safetensors"):
        found = read_state_dict(folder / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert ModelCard.beside(folder / "model.pt") == ModelCard.beside(models[name])
    assert torch.load(folder / "model.pt", weights_only=True).keys() == expected.keys()  # without a wrapper


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_defaults_are_those_of_the_card(bundles, models, name):
    card = ModelCard.beside(models[name])
    for config in ("inference", "train"):
        content = content_of(bundles / name, config)
        expected = {"architecture": card.architecture, **card.network, **card.preprocessing}
        assert {key: content[key] for key in expected} == expected
        assert content["bundle_root"] == "."
    assert content_of(bundles / name, "inference")["trained"] == card.trained
    training = content_of(bundles / name, "train")
    assert training["pretrained"] == "$@bundle_root + '/models/model.pt'"
    assert training["modality"] == "CT"


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_configs_do_no_more_than_those_they_were_made_of(bundles, name):
    for path in (bundles / name / "configs").rglob("*.json"):
        assert safety.problems_of_config(json.loads(path.read_text(encoding="utf-8"))) == [], path.name


def test_inference_has_nothing_that_only_training_needs(bundles, bundle_root):
    here = json.loads((bundle_root / "configs" / "inference.json").read_text())
    packaged = content_of(bundles / "hsp_sam", "inference")
    network = {value[1:] for value in packaged["network_def"].values() if str(value).startswith("@")}
    assert set(packaged) - set(here) <= network
    assert packaged["inferer_def"]["_target_"].endswith("PromptFreeInferer")
    assert packaged["exclusive_classes"] is True
    assert "lr_scheduler" not in packaged


def test_what_the_card_says_of_boxes_and_quality_becomes_a_setting(phantom_model):
    card = ModelCard.beside(phantom_model)
    learned = ModelCard(
        **{**vars(card), "training": {"boxes_trained": True, "quality_head_trained": True}, "trained": {}}
    )
    inference, training = packaging.configs_of(learned)
    assert (inference["boxes_trained"], inference["quality_head"]) == (True, True)
    assert training["modality"] == "CT"
    assert packaging.configs_of(card)[0]["boxes_trained"] is False


@pytest.mark.parametrize(("name", "classes"), [("phantom", PHANTOM_CLASSES), ("hsp_sam", TINY_CLASSES)])
def test_channels_are_named_by_the_classes_that_are_known(bundles, name, classes):
    """MONAI Label offers each name as a label, with the number before it as its value."""
    formats = content_of(bundles / name, "metadata")["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    size = content_of(bundles / name, "inference")["image_size"]
    assert list(pred["channel_def"].items()) == list(classes.items())
    assert pred["num_channels"] == 1 + max(map(int, classes))
    assert image["spatial_shape"] == pred["spatial_shape"] == [size, size]
    assert image["num_channels"] == 3


def test_metadata_tell_of_this_model(bundles):
    found = content_of(bundles / "hsp_sam", "metadata")
    assert found["name"] == "hsp_sam"
    assert found["modality"] == found["network_data_format"]["inputs"]["image"]["modality"] == "CT, MR"
    assert found["eval_metrics"] == {"val_mean_dsc": 0.25}
    assert "first, second" in found["data_source"]
    assert "level 50 and width 300" in found["image_classes"]
    assert found["label_classes"].endswith("0 background, 1 liver, 3 pancreas")
    assert "other channels are of classes that the model does not know" in found["pred_classes"]
    assert "softmax" in found["pred_classes"]
    assert "2506.02854" in found["references"][0]
    assert list(found["changelog"]) == [found["version"]]
    text = json.dumps(found)
    assert "phantom" not in text
    assert "2502.06817" not in text
    assert "sigmoid" in content_of(bundles / "phantom", "metadata")["pred_classes"]
    assert "never win" not in content_of(bundles / "phantom", "metadata")["pred_classes"]


@pytest.mark.parametrize("name", ["phantom", "hsp_sam"])
def test_the_page_leads_nowhere_that_is_not_there(bundles, name):
    docs = bundles / name / "docs"
    page = (docs / "README.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert (docs / "data_license.txt").is_file()
    assert "](data_license.txt)" in page
    assert page.count("](") == 1
    assert max(len(line) for line in page.splitlines()) <= 120
    terms = (docs / "data_license.txt").read_text(encoding="utf-8")
    assert ("first, second" in terms) == (name == "hsp_sam")


def test_a_card_that_knows_little(tmp_path, bundle_root):
    """No data set, no score and no trained class: nothing is made up in their place."""
    card = {"training": {}, "trained": {}, "preprocessing": {}}
    model = write_model(tmp_path / "in", random_hsp_sam(), architecture="hsp_sam", **card)
    described = package_model(model, tmp_path / "out", name="Mine")
    found = content_of(tmp_path / "out", "metadata")
    assert described.name == found["name"] == "Mine"
    assert found["eval_metrics"] == {}
    assert "does not name what it was trained on" in found["data_source"]
    assert "HU" not in found["image_classes"]
    schema = json.loads((bundle_root / "tests" / "data_files" / "meta_schema.json").read_text())
    jsonschema.validate({**found, "eval_metrics": {"any": 0.5}}, schema)  # ours wants a score, MONAI's does not


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_folder_that_holds_something_is_left_alone(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="there already and not empty"):
        package_model(models["phantom"], tmp_path / "out")
    with pytest.raises(OutputError, match="there already and not empty"):
        package_model(models["phantom"], tmp_path / "out" / "notes.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_empty_folder_is_filled(models, tmp_path):
    (tmp_path / "out").mkdir()
    package_model(models["phantom"], tmp_path / "out")
    assert (tmp_path / "out" / "models" / "model.pt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_breaks_off_leaves_nothing(models, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaging, "_save_weights", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        package_model(models["phantom"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def change_card(folder, **changes):
    path = folder / "model.json"
    content = json.loads(path.read_text())
    content["network"] |= changes
    path.write_text(json.dumps(content))


def remove_card(folder):
    (folder / "model.json").unlink()


def remove_weights(folder):
    (folder / "model.pt").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (remove_card, CheckpointError, "model.json is missing"),
        (remove_weights, CheckpointError, "there is no weights file"),
        (lambda folder: change_card(folder, prompts=2), CheckpointError, "does not fit"),
        (lambda folder: change_card(folder, speed=2), ConfigError, "the settings speed, which these configs do not"),
        (lambda folder: change_card(folder, class_ids=[1, 199]), PromptError, "Class id 199 is unknown"),
        (lambda folder: change_card(folder, fusion="$open('x', 'w')"), CheckpointError, "holds an expression"),
    ],
)
def test_a_model_that_is_refused(models, tmp_path, damage, error, reason):
    shutil.copytree(models["hsp_sam"].parent, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(error, match=reason):
        package_model(tmp_path / "in" / "model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(models, tmp_path, capsys):
    cli.main(["bundle", str(models["phantom"]), "--output", str(tmp_path / "out"), "--name", "Phantom organs"])
    assert capsys.readouterr().out == (
        f"the bundle is in {tmp_path / 'out'}; its model knows liver, spleen, pancreas, left kidney, right kidney\n"
    )
    assert content_of(tmp_path / "out", "metadata")["name"] == "Phantom organs"
    with pytest.raises(SystemExit):
        cli.main(["bundle", str(models["phantom"]), "--output", str(tmp_path / "out")])
    assert "not empty" in capsys.readouterr().err
