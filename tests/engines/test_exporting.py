"""Exported files compute what PyTorch computes, for any number of images and classes; or they are not there."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

from scripts import cli
from scripts.engines import exporting, graphs
from scripts.engines.exporting import FORMATS, TOLERANCE, export_model
from scripts.errors import CheckpointError, ConfigError, OutputError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_network_weights, save_state_dict
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.model_card import ModelCard

CLOSE = {"rtol": TOLERANCE, "atol": TOLERANCE}
SIZES = [(1, 1), (1, 4), (3, 1), (2, 5)]  # images and classes
IN_A_FRESH_PROCESS = """
import sys
import numpy as np
folder, given, found = sys.argv[1:]
inputs = np.load(given)
image, rest = inputs["image"], {name: inputs[name] for name in ("class_ids", "noise")}
if sys.argv[0] == "onnx":
    import onnxruntime
    encoder, decoder = (onnxruntime.InferenceSession(f"{folder}/{part}.onnx") for part in ("encoder", "decoder"))
    (embedding,) = encoder.run(None, {"image": image})
    logits, quality = decoder.run(None, {"embedding": embedding, **rest})
else:
    import torch
    encoder, decoder = (torch.export.load(f"{folder}/{part}.pt2").module() for part in ("encoder", "decoder"))
    with torch.no_grad():
        embedding = encoder(torch.from_numpy(image))
        logits, quality = (out.numpy() for out in decoder(embedding, *map(torch.from_numpy, rest.values())))
assert "scripts" not in sys.modules
np.savez(found, logits=logits, quality=quality)
"""


def write_model(folder, network, architecture="automedsam"):
    folder.mkdir(parents=True, exist_ok=True)
    save_state_dict(network.state_dict(), folder / "model.pt")
    card = ModelCard(network.settings, {"window": [40.0, 400.0]}, {"CT": ["liver"]}, architecture=architecture)
    card.write(folder / "model.json")
    return folder / "model.pt"


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(class_ids=(1, 2, 4)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    """All formats of a small network, and what was said of them."""
    folder = tmp_path_factory.mktemp("exports")
    outcome = export_model(write_model(tmp_path_factory.mktemp("model"), network), folder)
    assert outcome.failures == {}
    return folder, outcome.text


def fresh_inputs(network, images, classes, *, seed=3, noisy=True):
    """Inputs of the whole way; ids from beyond what the network was told of, which are numbers to it like others."""
    generator = torch.Generator().manual_seed(seed)
    grid = (graphs.EMBEDDING_CHANNELS, network.grid_size, network.grid_size)
    noise = torch.randn((images, classes, *grid), generator=generator) * noisy
    return {
        "image": torch.rand((images, 3, network.image_size, network.image_size), generator=generator),
        "class_ids": torch.randint(1, 12, (images, classes), generator=generator),
        "noise": noise,
    }


def expected_of(network, inputs, *, noisy=True):
    """The network's own answer; without noise it is given none, rather than zeros."""
    with torch.no_grad():
        found = network(inputs["image"], inputs["class_ids"], noise=inputs["noise"] if noisy else None)
    return found.logits, found.quality


def open_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def run(*inputs):
        given = {name: values.numpy() for name, values in zip(names, inputs, strict=True)}
        return [torch.from_numpy(values) for values in session.run(None, given)]

    return run


def open_pt2(path):
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(*inputs):
        return graphs.as_list(module(*inputs))

    return run


OPENED = {"onnx": open_onnx, "pt2": open_pt2}


@pytest.fixture(scope="module", params=OPENED)
def both_parts(exported, request):
    """Encoder and decoder of each format, as a program that reads the files calls them."""
    folder, _ = exported
    return [OPENED[request.param](folder / f"{part}.{request.param}") for part in ("encoder", "decoder")]


# --------------------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("images", "classes"), SIZES)
def test_both_parts_give_what_pytorch_gives(network, both_parts, images, classes, noisy):
    inputs = fresh_inputs(network, images, classes, noisy=noisy)
    encode, decode = both_parts
    (embedding,) = encode(inputs["image"])
    found = decode(embedding, inputs["class_ids"], inputs["noise"])
    torch.testing.assert_close(tuple(found), expected_of(network, inputs, noisy=noisy), **CLOSE)


def test_noise_and_classes_make_a_difference(network, both_parts):
    """So that the comparison above has something to compare."""
    encode, decode = both_parts
    inputs = fresh_inputs(network, 1, 2)
    (embedding,) = encode(inputs["image"])
    quiet, noisy, other = (
        decode(embedding, ids, noise)[0]
        for ids, noise in (
            (inputs["class_ids"], inputs["noise"] * 0),
            (inputs["class_ids"], inputs["noise"]),
            (inputs["class_ids"] + 3, inputs["noise"]),
        )
    )
    assert (quiet - noisy).abs().max() > 10 * TOLERANCE
    assert (noisy - other).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("form", OPENED)
def test_a_fresh_process_without_the_bundle_gives_the_same(network, exported, tmp_path, form):
    inputs = fresh_inputs(network, 2, 3)
    np.savez(tmp_path / "given.npz", **{name: values.numpy() for name, values in inputs.items()})
    script = tmp_path / "script.py"
    script.write_text(IN_A_FRESH_PROCESS.replace("sys.argv[0]", repr(form)))
    words = [exported[0], tmp_path / "given.npz", tmp_path / "found.npz"]
    done = subprocess.run([sys.executable, "-I", script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for values, name in zip(expected_of(network, inputs), ("logits", "quality"), strict=True):
        torch.testing.assert_close(torch.from_numpy(found[name]), values, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_torchscript_is_the_whole_network(network, exported, count):
    traced = torch.jit.load(exported[0] / "network.ts")
    image = fresh_inputs(network, count, 1)["image"]
    with torch.no_grad():
        torch.testing.assert_close(traced(image), network(image), **CLOSE)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_weights_are_those_of_the_model(network, exported, name):
    again = AutoMedSAM(**ModelCard.beside(exported[0] / name).network)
    load_network_weights(again, exported[0] / name)
    assert all(torch.equal(values, again.state_dict()[key]) for key, values in network.state_dict().items())


def test_weights_keep_their_type(build_network, tmp_path):
    """Of a model in half precision too, which is computed in single precision."""
    checkpoint = write_model(tmp_path / "model", build_network().half())
    (tmp_path / "out").mkdir()
    assert export_model(checkpoint, tmp_path / "out", formats=["safetensors"]).failures == {}
    state = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in state.values() if values.is_floating_point()} == {torch.float16}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"image_encoder": "lite_medsam"},
        {"image_encoder": "mobile_sam", "pixel_normalisation": "sam"},
        {"image_encoder": "sam_vit_b"},
        {"image_size": 96},
        {"image_encoder": "compact_detailed"},
        {"preset": "release", "diffusion_steps": 5},
        {"prompt_branches": "dense"},
        {"prompt_branches": "sparse"},
        {"diffusion": False},
    ],
    ids=str,
)
def test_every_kind_of_network_is_the_same(build_network, tmp_path, settings):
    network = build_network(**settings).eval()
    outcome = export_model(write_model(tmp_path, network), tmp_path)
    assert outcome.failures == {}
    one = settings.get("image_encoder") == "sam_vit_b"  # its attention is divided by the number of images
    inputs = fresh_inputs(network, 1 if one else 2, 3)
    noise = [] if settings.get("diffusion") is False else [inputs["noise"]]
    for form, opened in OPENED.items():
        (embedding,) = opened(tmp_path / f"encoder.{form}")(inputs["image"])
        found = opened(tmp_path / f"decoder.{form}")(embedding, inputs["class_ids"], *noise)
        torch.testing.assert_close(tuple(found), expected_of(network, inputs), **CLOSE)
    ports = json.loads((tmp_path / "manifest.json").read_text())["files"][0]["inputs"][0]["shape"]
    assert ports[0] == (1 if one else "images")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"image_encoder": "compact"},
        {"image_encoder": "lite_medsam", "image_size": 64, "prompt_source": "token_output", "fusion": "mask_prompt"},
        {"image_encoder": "compact", "prompt_source": "positional"},
        {"image_encoder": "sam_vit_b", "image_size": 64, "lora_rank": 4},
    ],
    ids=str,
)
def test_hsp_sam_is_exported_whole(tmp_path, settings):
    torch.manual_seed(0)
    network = HSPSAM(**{"image_size": 32, "class_ids": [1, 2, 4], **settings}).eval()
    for name, values in network.named_parameters():
        if name.endswith("_up"):  # LoRA's updates are zero at first, and would not be missed
            torch.nn.init.normal_(values, std=0.05)
    outcome = export_model(write_model(tmp_path, network, "hsp_sam"), tmp_path)
    assert outcome.failures == {}
    count = 1 if settings["image_encoder"] == "sam_vit_b" else 3
    image = torch.rand((count, 3, network.image_size, network.image_size))
    with torch.no_grad():
        expected = network(image)
        traced = torch.jit.load(tmp_path / "network.ts")(image)
    assert expected.shape[1] == 5
    assert (expected[:, 3] == torch.finfo(torch.float32).min).all()  # a class that it does not know
    for found in (open_onnx(tmp_path / "network.onnx")(image)[0], open_pt2(tmp_path / "network.pt2")(image)[0], traced):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.slow
def test_the_shipped_model_segments_the_same_pixels(bundle_root, tmp_path):
    weights = bundle_root / "models" / "model.pt"
    assert export_model(weights, tmp_path, formats=["onnx", "pt2"]).failures == {}
    network = AutoMedSAM(**ModelCard.beside(weights).network).eval()
    load_network_weights(network, weights)
    inputs = fresh_inputs(network, 2, len(network.class_ids))
    inputs["class_ids"] = torch.tensor([network.class_ids] * 2)
    expected, _ = expected_of(network, inputs)
    for form, opened in OPENED.items():
        (embedding,) = opened(tmp_path / f"encoder.{form}")(inputs["image"])
        logits, _ = opened(tmp_path / f"decoder.{form}")(embedding, inputs["class_ids"], inputs["noise"])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        assert ((logits > 0) == (expected > 0)).float().mean() > 0.9999


# ---------------------------------------------------------------------------------------------------- what is beside it


def test_the_manifest_describes_every_file(exported, network):
    folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {entry["file"]: entry for entry in manifest["files"]}
    assert set(files) | {"manifest.json", "model.json"} == {path.name for path in folder.iterdir()}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert 0 <= entry["largest_difference"] <= manifest["tolerance"] == TOLERANCE
        assert entry["format"] in FORMATS
    assert manifest["card"]["network"] == {**network.settings}
    assert manifest["card"]["trained"] == {"CT": ["liver"]}
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
    assert manifest["versions"]["onnx_opset"] == "20"


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_manifest_tells_what_the_graph_takes_and_gives(exported, part):
    folder, _ = exported
    entry = next(
        entry
        for entry in json.loads((folder / "manifest.json").read_text())["files"]
        if entry["file"] == f"{part}.onnx"
    )
    session = onnxruntime.InferenceSession(folder / f"{part}.onnx")
    types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    for side, ports in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert [(port["name"], port["shape"], port["dtype"]) for port in entry[side]] == [
            (port.name, port.shape, types[port.type]) for port in ports
        ]
    assert {opset.version for opset in onnx.load(folder / f"{part}.onnx").opset_import if not opset.domain} == {20}


def test_a_part_holds_its_own_weights_alone(exported):
    folder, _ = exported
    sizes = {name: (folder / name).stat().st_size for name in ("encoder.pt2", "decoder.pt2", "model.safetensors")}
    assert sizes["encoder.pt2"] < sizes["model.safetensors"]
    names = set(torch.export.load(folder / "encoder.pt2").state_dict)
    assert names
    assert all(".image_encoder." in f".{name}" for name in names)


def test_the_table_has_a_line_for_each_file(exported):
    folder, text = exported
    lines = text.splitlines()
    assert lines[0].split() == ["format", "file", "MB", "largest", "difference"]
    assert {line.split()[1] for line in lines[1:]} == {path.name for path in folder.iterdir()} - {
        "manifest.json",
        "model.json",
    }


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def checkpoint(network, tmp_path):
    return write_model(tmp_path / "model", network)


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("wrong", ["values", "shape", "nan"])
def test_a_file_that_is_off_is_not_left_behind(checkpoint, output, monkeypatch, capsys, wrong):
    """The others stay; what was there before stays too."""
    (output / "encoder.pt2").write_text("of before")
    write = exporting._write_pt2
    spoil = {"values": lambda x: x + 2e-3, "shape": lambda x: x[:, :1], "nan": lambda x: x * torch.nan}[wrong]

    def spoilt(graph, path):
        run = write(graph, path)
        return lambda inputs: [spoil(values) for values in run(inputs)]

    monkeypatch.setattr(exporting, "_write_pt2", spoilt)
    monkeypatch.setattr(exporting, "parts", lambda network: graphs.parts(network)[:1])
    with pytest.raises(SystemExit):
        cli.main(["export", "--checkpoint", str(checkpoint), "--output", str(output), "--formats", "pt2,safetensors"])
    said = capsys.readouterr()
    assert "model.safetensors" in said.out
    assert "encoder.pt2 (its outputs differ from PyTorch's by" in said.err
    assert {path.name for path in output.iterdir()} == {
        *("encoder.pt2", "model.safetensors", "model.pt", "model.json", "manifest.json")
    }
    assert (output / "encoder.pt2").read_text() == "of before"


def test_what_an_exporter_cannot_do_is_said_in_words(checkpoint, output, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("there is no\noperator for this")

    monkeypatch.setattr(exporting, "to_onnx", fail)
    outcome = export_model(checkpoint, output, formats=["onnx"])
    assert outcome.failures["encoder.onnx"] == "RuntimeError: there is no operator for this"
    assert not list(output.glob("*.onnx"))


def test_an_interruption_leaves_nothing(checkpoint, output, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_difference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(checkpoint, output, formats=["safetensors"])
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("formats", [["onnx", "tensorrt"], []])
def test_unknown_formats_are_refused(checkpoint, output, formats):
    with pytest.raises(ConfigError, match="formats are onnx, pt2, safetensors, torchscript; got"):
        export_model(checkpoint, output, formats=formats)


def test_weights_that_are_not_there_or_whole_or_of_the_card_are_refused(checkpoint, output, build_network):
    with pytest.raises(CheckpointError, match="there is no weights file"):
        export_model(output / "model.pt", output)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a whole PyTorch weights file"):
        export_model(checkpoint, output)
    save_state_dict(build_network(channels=(4, 8, 16)).state_dict(), checkpoint)
    with pytest.raises(CheckpointError, match="does not fit"):
        export_model(checkpoint, output)
    checkpoint.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.json is missing"):
        export_model(checkpoint, output)
    assert list(output.iterdir()) == []


def test_a_missing_package_says_how_to_install_it(checkpoint, output, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ConfigError, match="pip install onnxruntime, or choose other --formats"):
        export_model(checkpoint, output, formats=["onnx"])


def test_a_full_disk_is_said_in_words(checkpoint, output, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.shutil, "copyfile", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_model(checkpoint, output, formats=["safetensors"])
    assert list(output.iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_said_in_words(checkpoint, output):
    (output / "model.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"model\.safetensors cannot be written"):
        export_model(checkpoint, output, formats=["safetensors"])


def test_a_model_may_be_exported_beside_itself(checkpoint):
    before = checkpoint.with_suffix(".json").read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    assert export_model(checkpoint, checkpoint.parent, formats=["safetensors"]).failures == {}
    assert checkpoint.with_suffix(".json").read_bytes() == before
    assert all(torch.equal(values, state[name]) for name, values in torch.load(checkpoint, weights_only=True).items())


def test_a_safetensors_file_is_a_model_too(exported, output):
    folder, _ = exported
    for name in ("model.safetensors", "model.json"):
        shutil.copy(folder / name, output)
    assert export_model(output / "model.safetensors", output, formats=["safetensors"]).failures == {}
    assert (output / "model.pt").is_file()


def test_parts_share_their_memory_with_the_network_and_leave_it_whole(build_network):
    network = build_network().eval()
    before = set(network.state_dict())
    encoder, decoder = (graph.function for graph in graphs.parts(network))
    assert set(network.state_dict()) == before
    shared = {id(values) for values in network.parameters()}
    for part in (encoder, decoder):
        assert {id(values) for values in part.parameters()} < shared
