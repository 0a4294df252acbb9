"""The other runtime: the same function as PyTorch's; its graphs are kept, and never stale, damaged or half there."""

import importlib.util
import logging
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.data.phantoms import make_phantom
from scripts.data.preprocessing import scale_intensity
from scripts.engines.inferers import ClassPromptInferer
from scripts.engines.runtimes import (
    PROMPTS_TOGETHER,
    OpenVinoNetwork,
    _groups,
    _whole_folder,
    choose_runtime,
    cpu_bf16_pays,
)
from scripts.errors import ConfigError, OutputError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_network_weights
from scripts.networks.model_card import ModelCard
from scripts.networks.prompts import PromptEmbeddings

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # what other sums in other orders may change; in bfloat16 it would be 1e-2


@pytest.fixture(scope="session")
def openvino():
    """What needs the package is left out where it is missing; the import itself is the tested module's."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("the optional package openvino is not installed")


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(class_ids=(1, 2, 4)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Where weights would lie; the graphs beside it are shared by the tests that do not change them."""
    return tmp_path_factory.mktemp("weights") / "model.pt"


@pytest.fixture(scope="module")
def runtime(openvino, network, checkpoint):
    return OpenVinoNetwork(network, checkpoint=checkpoint)


def images(count, size=32, seed=1):
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


def graphs(folder: Path) -> dict[str, float]:
    """The kept graphs with the time of their making."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / ".runtime").rglob("graph.bin")}


# ------------------------------------------------------------------------------------------------- the same function


def test_what_the_network_says_of_itself_is_unchanged(runtime, network):
    assert (runtime.image_size, runtime.grid_size, runtime.class_ids) == (32, 4, (1, 2, 4))


@pytest.mark.parametrize("count", [1, 3])
def test_embeddings_are_those_of_pytorch(runtime, network, count):
    image = images(count)
    expected = network.encode_image(image)
    assert expected.std() > 0.1
    torch.testing.assert_close(runtime.encode_image(image), expected, **CLOSE)


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("noisy", [False, True])
def test_prompts_and_masks_are_those_of_pytorch(
    openvino, build_network, runtime, network, checkpoint, generator, preset, noisy
):
    """Five classes are a group and one more; without class 3 among the first, ids and places differ."""
    if preset == "release":
        network = build_network(preset=preset, diffusion_steps=3).eval().requires_grad_(False)
        runtime = OpenVinoNetwork(network, checkpoint=checkpoint)
    embedding = torch.randn((2, 256, 4, 4), generator=generator)
    class_ids = torch.tensor([[5, 2, 9, 1, 7], [13, 12, 11, 10, 1]])
    given = {}
    if noisy:
        noise = torch.randn((2, 5, 256, 4, 4), generator=generator)
        given = {"noise": noise, "timestep": torch.tensor([[1, 2, 3, 1, 2], [3, 3, 1, 1, 2]])}
    expected = network.encode_classes(embedding, class_ids, **given)
    prompts = runtime.encode_classes(embedding, class_ids, **given)
    torch.testing.assert_close(tuple(prompts), tuple(expected), **CLOSE)
    if preset == "paper":
        answer, quality = network.decode(embedding, expected)
        assert answer.shape == (2, 5, 32, 32)
        torch.testing.assert_close(runtime.decode(embedding, prompts), (answer, quality), **CLOSE)


def test_without_a_step_the_noise_is_that_of_the_last(runtime, network, generator):
    embedding, noise = torch.randn((1, 256, 4, 4), generator=generator), torch.randn((1, 1, 256, 4, 4))
    ids = torch.tensor([[2]])
    expected = network.encode_classes(embedding, ids, noise=noise)
    torch.testing.assert_close(tuple(runtime.encode_classes(embedding, ids, noise=noise)), tuple(expected), **CLOSE)


@pytest.mark.parametrize("shape", [(1, 12, 20, 3), (3, 40, 24, 1)])
@pytest.mark.parametrize("noise_seed", [None, 7])
def test_the_inferer_takes_it_in_the_networks_place(runtime, network, generator, shape, noise_seed):
    image = torch.rand((1, *shape), generator=generator) * 255
    inferer = ClassPromptInferer(noise_seed=noise_seed)
    with torch.inference_mode():
        expected, logits = (inferer(image, model, class_ids=[4, 1]) for model in (network, runtime))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_masks_of_phantoms_are_those_of_pytorch(openvino, bundle_root, tmp_path):
    """The shipped model on two phantoms, all its classes: DSC 0.999 or more, logits to 1e-3."""
    weights = bundle_root / "models" / "model.pt"
    network = AutoMedSAM(**ModelCard.beside(weights).network).eval().requires_grad_(False)
    load_network_weights(network, weights)
    runtime = OpenVinoNetwork(network, checkpoint=tmp_path / "model.pt")
    for seed in (5, 6):
        phantom = make_phantom(np.random.default_rng(seed), size=64, slices=12)
        values = torch.from_numpy(phantom.hu.astype(np.float32))[None]  # (1, X, Y, D)
        image = scale_intensity(values, modality="CT", window=(40.0, 400.0))[None, ..., 3:9]
        expected, logits = (ClassPromptInferer()(image, model) for model in (network, runtime))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        first, second = expected > 0, logits > 0
        assert first.sum() > 500
        overlap = 2 * (first & second).sum((2, 3, 4)) / (first.sum((2, 3, 4)) + second.sum((2, 3, 4))).clamp(min=1)
        asked = first.sum((2, 3, 4)) > 0
        assert (overlap[asked] >= 0.999).all()


def test_a_callers_mixed_precision_does_not_get_into_the_graph(openvino, network, tmp_path):
    image = images(1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = OpenVinoNetwork(network, checkpoint=tmp_path / "model.pt").encode_image(image)
    torch.testing.assert_close(embedding, network.encode_image(image), **CLOSE)


def test_a_training_network_is_exported_as_it_predicts_and_stays_in_training(openvino, build_network, tmp_path):
    network = build_network(image_encoder="lite_medsam", image_size=28, train_image_encoder=True).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    embedding = OpenVinoNetwork(network, checkpoint=tmp_path / "model.pt").encode_image(images(1, size=28))
    assert network.training
    assert network.image_encoder.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(embedding, network.eval().encode_image(images(1, size=28)), **CLOSE)


# ---------------------------------------------------------------------------------------------------- memory is its own


def test_an_answer_survives_the_next_question(runtime):
    first = runtime.encode_image(images(1))
    kept = first.clone()
    second = runtime.encode_image(images(1, seed=2))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_what_is_asked_with_stays_as_it_was_and_is_asked_anew_each_time(runtime, generator):
    """Runtimes have written into the memory of their inputs, and have read it again for a later question."""
    embedding = torch.randn((1, 256, 4, 4), generator=generator)
    sparse, dense = torch.randn((1, 2, 256), generator=generator), torch.randn((1, 256, 4, 4), generator=generator)
    kept = [values.clone() for values in (embedding, sparse, dense)]
    first, _ = runtime.decode(embedding, PromptEmbeddings(sparse, dense))
    again, _ = runtime.decode(embedding, PromptEmbeddings(sparse, dense))
    assert torch.equal(first, again)
    assert all(torch.equal(values, copy) for values, copy in zip((embedding, sparse, dense), kept, strict=True))
    dense.zero_()  # in the same memory
    other, _ = runtime.decode(embedding, PromptEmbeddings(sparse, dense))
    assert not torch.equal(first, other)


def test_a_strided_input_is_read_as_it_looks(runtime, network):
    image = images(1).transpose(2, 3)
    torch.testing.assert_close(runtime.encode_image(image), network.encode_image(image), **CLOSE)


# ------------------------------------------------------------------------------------------------------ kept graphs


def test_a_graph_is_made_once_and_found_again(openvino, network, runtime, checkpoint, caplog):
    expected = runtime.encode_image(images(1))
    before = graphs(checkpoint.parent)
    with caplog.at_level(logging.INFO):
        again = OpenVinoNetwork(network, checkpoint=checkpoint).encode_image(images(1))
    assert torch.equal(again, expected)
    assert graphs(checkpoint.parent) == before
    assert "exported" not in caplog.text


@pytest.mark.parametrize("name", ["graph.bin", "graph.xml", "sha256"])
def test_a_damaged_graph_is_named_and_made_anew(openvino, network, tmp_path, caplog, name):
    checkpoint = tmp_path / "model.pt"
    expected = OpenVinoNetwork(network, checkpoint=checkpoint).encode_image(images(1))
    (file,) = tmp_path.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert torch.equal(OpenVinoNetwork(network, checkpoint=checkpoint).encode_image(images(1)), expected)
    assert f"{file.parent} is damaged" in caplog.text
    assert bytes(content) != file.read_bytes()


def test_other_weights_are_another_graph(openvino, build_network, tmp_path):
    """Loaded later, loaded anew or changed in place: never the graph of the weights before."""
    network = build_network().eval().requires_grad_(False)
    runtime = OpenVinoNetwork(network, checkpoint=tmp_path / "model.pt")
    first = runtime.encode_image(images(1))
    network.load_state_dict(build_network(seed=1).state_dict())
    torch.testing.assert_close(runtime.encode_image(images(1)), network.encode_image(images(1)), **CLOSE)
    network.load_state_dict(build_network(seed=0).state_dict())
    assert torch.equal(runtime.encode_image(images(1)), first)
    assert len(list((tmp_path / ".runtime").iterdir())) == 2


@pytest.fixture
def no_room(tmp_path, monkeypatch):
    """A weights folder in which `.runtime` cannot be made, and an empty user cache."""
    (tmp_path / ".runtime").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_where_the_weights_folder_cannot_be_written_the_users_cache_is(openvino, network, no_room, caplog):
    with caplog.at_level(logging.INFO):
        embedding = OpenVinoNetwork(network, checkpoint=no_room / "model.pt").encode_image(images(1))
    torch.testing.assert_close(embedding, network.encode_image(images(1)), **CLOSE)
    (graph,) = (no_room / "cache" / "automedsam" / "runtime").rglob("graph.xml")
    assert str(graph.parent) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        OpenVinoNetwork(network, checkpoint=no_room / "model.pt").encode_image(images(1))
    assert "exported" not in caplog.text


def test_where_neither_can_be_written_the_error_names_both(openvino, network, no_room):
    (no_room / "cache").write_text("")
    with pytest.raises(OutputError, match=r"\.runtime.*cache.*--runtime torch") as error:
        OpenVinoNetwork(network, checkpoint=no_room / "model.pt").encode_image(images(1))
    assert "\n" not in str(error.value)


def test_a_broken_off_writing_leaves_nothing(tmp_path):
    def break_off():
        with _whole_folder(tmp_path / "graph") as temporary:
            (temporary / "graph.xml").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_one_stays(tmp_path):
    for content in ("first", "second"):
        with _whole_folder(tmp_path / "graph") as temporary:
            (temporary / "graph.xml").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
    assert (tmp_path / "graph" / "graph.xml").read_text() == "first"


# ---------------------------------------------------------------------------------------------------------- choices


def test_torch_is_the_network_itself(network, tmp_path):
    assert choose_runtime(network, runtime="torch", checkpoint=tmp_path / "model.pt") is network


def test_openvino_is_the_other_runtime(openvino, network, tmp_path):
    chosen = choose_runtime(network, runtime="openvino", checkpoint=tmp_path / "model.pt")
    assert isinstance(chosen, OpenVinoNetwork)
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is needed


def test_an_unknown_runtime_is_refused(network, tmp_path):
    with pytest.raises(ConfigError, match="torch, openvino, not 'onnx'"):
        choose_runtime(network, runtime="onnx", checkpoint=tmp_path / "model.pt")


def test_a_missing_package_says_how_to_install_it(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match="pip install openvino"):
        choose_runtime(network, runtime="openvino", checkpoint=tmp_path / "model.pt")


def test_a_network_elsewhere_than_on_the_cpu_is_refused(openvino, build_network, tmp_path):
    runtime = OpenVinoNetwork(build_network().to("meta"), checkpoint=tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="on meta: --device cpu"):
        runtime.encode_image(images(1))


def test_no_use_is_reported(runtime):
    assert sys.modules.get("openvino_telemetry") is None


@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (2, 3), (1, 13), (3, 8), (2, 0)])
def test_every_prompt_is_in_one_group(images, prompts):
    groups = list(_groups(images, prompts))
    places = [(image, place) for image, some in groups for place in range(some.start, some.stop)]
    assert places == [(image, place) for image in range(images) for place in range(prompts)]
    assert {some.stop - some.start for _, some in groups} <= {1, PROMPTS_TOGETHER}


@pytest.mark.skipif(platform.system() != "Linux", reason="the processor's flags are read from Linux")
def test_bfloat16_pays_where_the_processor_has_instructions_for_it():
    text = Path("/proc/cpuinfo").read_text()
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    assert cpu_bf16_pays() == bool({"amx_bf16", "avx512_bf16"} & set(flags))


@pytest.mark.parametrize(("amx", "avx"), [(False, False), (True, False), (False, True)])
def test_either_kind_of_instruction_will_do(monkeypatch, amx, avx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert cpu_bf16_pays() == (amx or avx)


def test_a_pytorch_that_cannot_tell_counts_as_no(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert cpu_bf16_pays() is False


def test_the_inferer_runs_on_the_chosen_runtime(runtime, network, checkpoint, monkeypatch):
    volume = torch.rand((1, 1, 20, 28, 3), generator=torch.Generator().manual_seed(5)) * 255
    expected = ClassPromptInferer()(volume, network, class_ids=[1, 4])
    inferer = ClassPromptInferer(runtime="openvino", checkpoint=str(checkpoint))
    for part in ("encode_image", "encode_classes", "decode"):  # PyTorch has nothing left to do
        monkeypatch.setattr(network, part, None)
    torch.testing.assert_close(inferer(volume, network, class_ids=[1, 4]), expected, **CLOSE)
    assert inferer._model(network) is inferer._model(network)


def test_another_runtime_needs_to_know_where_the_weights_are():
    with pytest.raises(ConfigError, match="beside the weights"):
        ClassPromptInferer(runtime="openvino")
