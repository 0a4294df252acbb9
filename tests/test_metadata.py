"""configs/metadata.json, and what stands beside it in the root of the bundle, tell the truth about the rest."""

import copy
import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
import tomllib

import jsonschema
import numpy as np
import pytest
import yaml
from monai.bundle import verify_metadata
from packaging.requirements import Requirement
from packaging.version import Version

import scripts
from scripts.data.vocabulary import Vocabulary

# The text as the Apache Software Foundation publishes it, https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
LARGEST_FILE = 25 * 1024 * 1024  # bytes; the model zoo wants larger ones in large_files.yml
# Names under which packages are imported, where they differ from those under which they are installed.
MODULES = {"pytorch-ignite": "ignite", "pillow": "PIL", "pyyaml": "yaml"}


@pytest.fixture(scope="module")
def metadata(bundle_root):
    return json.loads((bundle_root / "configs" / "metadata.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schema(bundle_root):
    return json.loads((bundle_root / "tests" / "data_files" / "meta_schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def inference(bundle_root):
    return json.loads((bundle_root / "configs" / "inference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vocabulary(bundle_root):
    return Vocabulary.read(bundle_root / "configs" / "classes.yaml")


@pytest.fixture(scope="module")
def stated_versions(metadata):
    named = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    return {package: metadata[key] for package, key in named.items()} | metadata["required_packages_version"]


@pytest.fixture(scope="module")
def requirements(bundle_root):
    lines = (bundle_root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_monai_verifies_the_metadata_without_a_network(bundle_root, tmp_path):
    schema_file = tmp_path / "schema.json"
    shutil.copy(bundle_root / "tests" / "data_files" / "meta_schema.json", schema_file)
    verify_metadata(meta_file=str(bundle_root / "configs" / "metadata.json"), filepath=str(schema_file))


def set_version(content):
    content["version"] = "0.1"


def drop_the_task(content):
    del content["task"]


def give_a_version_as_number(content):
    content["numpy_version"] = 2.4


def use_the_old_name_of_required_packages(content):
    content["optional_packages_version"] = content["required_packages_version"]


def drop_the_outputs(content):
    del content["network_data_format"]["outputs"]


def name_a_channel(content):
    content["network_data_format"]["outputs"]["pred"]["channel_def"]["liver"] = "liver"


def drop_a_tensor_key(content):
    del content["network_data_format"]["inputs"]["image"]["dtype"]


def add_a_format_without_inputs(content):
    content["saved_data_format"] = {"outputs": {"pred": 1}}


@pytest.mark.parametrize(
    "damage",
    [
        set_version,
        drop_the_task,
        give_a_version_as_number,
        use_the_old_name_of_required_packages,
        drop_the_outputs,
        name_a_channel,
        drop_a_tensor_key,
        add_a_format_without_inputs,
    ],
)
def test_the_schema_refuses(metadata, schema, damage):
    content = copy.deepcopy(metadata)
    damage(content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_one_version_everywhere(bundle_root, metadata):
    project = tomllib.loads((bundle_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((bundle_root / "CITATION.cff").read_text(encoding="utf-8"))
    assert metadata["version"] == scripts.__version__ == project["version"] == citation["version"]


def test_the_version_is_in_both_changelogs(bundle_root, metadata):
    headings = re.findall(r"^## \[(.+?)\]", (bundle_root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert metadata["version"] in metadata["changelog"]
    assert set(metadata["changelog"]) <= set(headings)


def test_image_and_pred_come_first(metadata):
    tensors = metadata["network_data_format"]
    assert next(iter(tensors["inputs"])) == "image"
    assert next(iter(tensors["outputs"])) == "pred"


def test_channels_are_the_classes_of_the_network(metadata, inference, vocabulary):
    pred = metadata["network_data_format"]["outputs"]["pred"]
    names = {str(class_id): vocabulary.entry(class_id).name for class_id in inference["class_ids"]}
    assert pred["channel_def"] == {"0": "background", **names}
    assert pred["num_channels"] == 1 + max(inference["class_ids"])


def test_trained_classes_are_the_channels(metadata, inference):
    named = list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values())[1:]
    assert {name for names in inference["trained"].values() for name in names} == set(named)


def test_trained_modalities_are_those_of_the_image(metadata, inference, vocabulary):
    listed = metadata["network_data_format"]["inputs"]["image"]["modality"].split(", ")
    assert {vocabulary.modality(name).name for name in listed} == set(inference["trained"])


def test_prose_names_every_class(metadata, inference):
    for names in inference["trained"].values():
        for key in ("label_classes", "pred_classes"):
            assert all(name in metadata[key] for name in names)


def test_tensors_have_the_size_of_the_network(metadata, inference):
    tensors = metadata["network_data_format"]
    size = [inference["image_size"]] * 2
    assert tensors["inputs"]["image"]["spatial_shape"] == tensors["outputs"]["pred"]["spatial_shape"] == size
    assert np.dtype(tensors["inputs"]["image"]["dtype"]) == np.float32


def test_stated_versions_are_tested_ones(stated_versions):
    for package, version in stated_versions.items():
        # A local build is the same version: 2.15.0+cpu fulfils 2.15.0.
        assert Version(version) <= Version(importlib.metadata.version(package)), package


def test_stated_versions_fulfil_the_requirements(stated_versions, requirements):
    for requirement in requirements:
        assert requirement.specifier.contains(stated_versions[requirement.name]), requirement


def test_every_requirement_has_a_stated_version(stated_versions, requirements):
    assert {requirement.name for requirement in requirements} == set(stated_versions)


def test_required_packages_can_be_imported(stated_versions):
    for package in stated_versions:
        importlib.import_module(MODULES.get(package, package.replace("-", "_")))


def test_licence_is_the_whole_unchanged_text(bundle_root):
    content = (bundle_root / "LICENSE").read_bytes()
    # The two texts by which MONAI tells the licence when a bundle is published.
    assert b"Apache License" in content
    assert b"Version 2.0" in content
    assert hashlib.sha256(content).hexdigest() == APACHE_SHA256


def test_large_files_have_every_key_and_a_strong_hash(bundle_root):
    table = yaml.safe_load((bundle_root / "large_files.yml").read_text(encoding="utf-8"))
    assert set(table) == {"large_files"}
    for row in table["large_files"]:
        assert set(row) == {"path", "url", "hash_val", "hash_type"}
        assert row["hash_type"] == "sha256"
        assert re.fullmatch(r"[0-9a-f]{64}", row["hash_val"])
        assert row["url"].startswith("https://")
        assert (bundle_root / row["path"]).resolve().is_relative_to(bundle_root)


def test_the_shipped_model_is_small_enough_for_the_repository(bundle_root):
    assert (bundle_root / "models" / "model.pt").stat().st_size <= LARGEST_FILE


def test_citation_names_what_the_bundle_builds_on(bundle_root):
    citation = yaml.safe_load((bundle_root / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    titles = [reference["title"] for reference in citation["references"]]
    for title in ("Diffusion-empowered AutoPrompt MedSAM", "Segment Anything", "Segment anything in medical images"):
        assert title in titles
    assert any(title.startswith("MONAI") for title in titles)


def test_figures_are_those_of_the_models_page(bundle_root, metadata):
    """docs/model.md holds the table that the command beside it printed, to three decimals."""
    page = (bundle_root / "docs" / "model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| \d+ \| \*\*([\d.]+)\*\* \([^)]*\) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) == 13
    stated = metadata["eval_metrics"]
    for name, label, dsc, nsd in rows:
        key = f"{name}_{label.replace(' ', '_')}"
        assert (stated[f"{key}_dsc"], stated[f"{key}_nsd"]) == pytest.approx((float(dsc), float(nsd)), abs=5.1e-4)
    (empty, asked) = re.search(r"(\d+) of (\d+) answers were empty", page).groups()
    assert stated["impossible_classes_empty"] == pytest.approx(int(empty) / int(asked), abs=1e-4)
