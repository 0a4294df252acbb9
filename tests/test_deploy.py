"""The bundle in MONAI Deploy's App SDK: what its operator for bundles reads, calls and gets, step by step.

The SDK needs Holoscan and CUDA's libraries, half a gigabyte, so that the tests do here what
`MonaiBundleInferenceOperator` of version 4.0 does with a folder. Where the SDK is installed, the last test runs an
application of it.
"""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from scripts import cli
from scripts.engines.evaluators import intended_error
from scripts.errors import InputError, PromptError

DROPPED = ("LoadImage", "SaveImage")
AXES = {
    "as written": lambda volume: volume,
    "flipped and turned": lambda volume: volume.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])),
}


class BundleOperator:
    """What the operator does with a bundle that is a folder, in its order."""

    def __init__(self, folder, *, preprocessing="handed_preprocessing", configs=("inference", "deploy")):
        parser = ConfigParser()
        parser.read_meta(f=json.loads((folder / "configs" / "metadata.json").read_text()))
        parser.read_config([_config(folder, name) for name in configs])
        parser.parse()
        formats = parser["_meta_"]["network_data_format"]
        self.inputs, self.outputs = list(formats["inputs"]), list(formats["outputs"])
        self.device = parser.get_parsed_content("device")
        self.inferer = parser.get_parsed_content("inferer")
        self.preprocessing, self.postprocessing = (
            _without_files(parser.get_parsed_content(name)) for name in (preprocessing, "postprocessing")
        )
        assert not (folder / "models" / "model.ts").exists()  # it would be taken in the network's place
        self.network = parser.get_parsed_content("network")
        state = torch.load(folder / "models" / "model.pt", map_location=self.device, weights_only=True)
        assert not {"state_dict", "model"} & set(state)
        self.network.load_state_dict(state, strict=True)
        self.network.eval()

    def compute(self, values, meta):
        """Map an array and its metadata to the label map `(1, X, Y, Z)`."""
        first, *others = self.inputs
        assert others == []
        with torch.no_grad():
            values = convert_to_dst_type(values, dst=values)[0]
            image = MetaTensor.ensure_torch_and_prune_meta(values, dict(meta))
            data = self.preprocessing({first: image})
            kept = data.pop(first)
            tensors = {key: value[None] for key, value in data.items() if isinstance(value, torch.Tensor)}
            answer = self.inferer(inputs=kept[None].to(self.device), network=self.network, **tensors)
            data[first] = kept
            return self.postprocessing({self.outputs[0]: next(iter(answer)), **data})[self.outputs[0]]


def _config(folder, name):
    return next(path for suffix in (".json", ".yaml") if (path := folder / "configs" / f"{name}{suffix}").exists())


def _without_files(compose):
    kept = [part for part in compose.transforms if not any(name in type(part).__name__ for name in DROPPED)]
    assert isinstance(kept[0], MapTransform)  # by which the operator knows that they take dictionaries
    compose.transforms = tuple(kept)
    return compose


def handed(volume, **further):
    """An image as the operator makes it of the SDK's: axes X, Y, Z, no channel, integers."""
    meta = {"original_affine": volume.affine.copy(), "affine": volume.affine.copy()}
    return np.asarray(volume.dataobj), {**meta, "original_channel_dim": "no_channel", **further}


@pytest.fixture(scope="module")
def volumes(tiny_phantoms, phantom_model, tmp_path_factory):
    """A phantom by the way its axes lie: the volume, and what `automedsam infer` makes of its file."""
    folder = tmp_path_factory.mktemp("volumes")
    original = nibabel.load(tiny_phantoms.parent / "images" / "phantom_004.nii.gz")
    found = {}
    for number, (name, turned) in enumerate(AXES.items()):
        volume = turned(original)
        path = folder / f"{number}.nii.gz"
        nibabel.save(volume, path)
        words = ["infer", str(path), "--checkpoint", str(phantom_model), "--modality", "CT", "--noprogress_bar"]
        cli.main([*words, "--output", str(folder / "out")])
        found[name] = volume, np.asarray(nibabel.load(folder / "out" / f"{number}_seg.nii.gz").dataobj)
    return found


@pytest.fixture
def operator(phantom_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an application runs anywhere
    return BundleOperator(phantom_bundle)


@pytest.mark.parametrize("axes", AXES)
def test_the_label_map_is_that_of_the_command(operator, volumes, tmp_path, axes):
    volume, expected = volumes[axes]
    labels = operator.compute(*handed(volume, Modality="CT"))
    assert tuple(labels.shape) == (1, *volume.shape)
    assert 1 in expected  # a liver of 30 pixels is found even at this size
    np.testing.assert_array_equal(labels[0].numpy(), expected)
    np.testing.assert_allclose(labels.affine.numpy(), volume.affine)
    assert list(tmp_path.iterdir()) == []  # nothing is written where the operator hands on what it gets


@pytest.mark.parametrize(("axis", "place"), [(-1, -1), (0, 0), ("0", 0)])
def test_channels_are_found_where_the_metadata_says(operator, volumes, axis, place):
    volume, expected = volumes["as written"]
    values, meta = handed(volume)
    labels = operator.compute(np.expand_dims(values, place), {**meta, "original_channel_dim": axis})
    np.testing.assert_array_equal(labels[0].numpy(), expected)


def test_one_operator_takes_one_image_after_the_other(operator, volumes):
    for _ in range(2):
        for volume, expected in volumes.values():
            np.testing.assert_array_equal(operator.compute(*handed(volume))[0].numpy(), expected)


def test_an_image_of_another_modality_is_refused(operator, volumes):
    with pytest.raises(RuntimeError) as caught:
        operator.compute(*handed(volumes["as written"][0], Modality="MR"))
    assert isinstance(intended_error(caught.value), PromptError)


def test_an_image_without_its_place_is_refused(operator, volumes):
    values, meta = handed(volumes["as written"][0])
    with pytest.raises(RuntimeError) as caught:
        operator.compute(values, {"original_channel_dim": meta["original_channel_dim"]})
    reason = intended_error(caught.value)
    assert isinstance(reason, InputError)
    assert "original_affine" in str(reason)


def test_weights_that_do_not_fit_are_refused(bundle_root, tmp_path):
    for part in ("configs", "models"):
        shutil.copytree(bundle_root / part, tmp_path / part)
    weights = tmp_path / "models" / "model.pt"
    state = torch.load(weights, weights_only=True)
    torch.save(dict(list(state.items())[1:]), weights)
    with pytest.raises(RuntimeError, match="Missing key"):
        BundleOperator(tmp_path)


def test_the_bundle_that_comes_with_the_software_is_opened_too(bundle_root, volumes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    volume, _ = volumes["flipped and turned"]
    nibabel.save(volume, tmp_path / "scan.nii.gz")
    cli.main(["infer", "scan.nii.gz", "--modality", "CT", "--output", "out", "--noprogress_bar"])
    labels = BundleOperator(bundle_root).compute(*handed(volume, Modality="CT"))
    expected = np.asarray(nibabel.load(tmp_path / "out" / "scan_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(labels[0].numpy(), expected)


def test_an_application_of_the_sdk_gives_the_same_label_map(phantom_bundle, volumes, tmp_path, monkeypatch):
    pytest.importorskip("monai.deploy", reason="the MONAI Deploy App SDK is not installed, see docs/deploy.md")
    from monai.deploy.conditions import CountCondition
    from monai.deploy.core import AppContext, Application, Image, IOType, Operator
    from monai.deploy.operators.monai_bundle_inference_operator import (
        BundleConfigNames,
        IOMapping,
        MonaiBundleInferenceOperator,
    )

    monkeypatch.chdir(tmp_path)
    volume, expected = volumes["flipped and turned"]
    received = []

    class Source(Operator):
        def setup(self, spec):
            spec.output("image")

        def compute(self, op_input, op_output, context):
            sizes = dict(zip(("row", "col", "depth"), map(float, volume.header.get_zooms()), strict=True))
            meta = {f"{name}_pixel_spacing": size for name, size in sizes.items()}
            meta |= {"nifti_affine_transform": volume.affine, "Modality": "CT"}  # as of DICOMSeriesToVolumeOperator
            op_output.emit(Image(np.swapaxes(np.asarray(volume.dataobj), 0, 2), meta), "image")

    class Sink(Operator):
        def setup(self, spec):
            spec.input("pred")

        def compute(self, op_input, op_output, context):
            received.append(op_input.receive("pred").asnumpy())

    class App(Application):
        def compose(self):
            source, sink = Source(self, CountCondition(self, 1), name="source"), Sink(self, name="sink")
            infer = MonaiBundleInferenceOperator(
                self,
                app_context=AppContext({}),
                input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
                output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
                bundle_path=phantom_bundle,
                bundle_config_names=BundleConfigNames(
                    preproc_name="handed_preprocessing", config_names=["inference", "deploy"]
                ),
                name="infer",
            )
            self.add_flow(source, infer, {("image", "image")})
            self.add_flow(infer, sink, {("pred", "pred")})

    App().run()
    (labels,) = received
    np.testing.assert_array_equal(np.swapaxes(labels, 0, 2), expected)
