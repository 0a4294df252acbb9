"""The other runtime: the same function as PyTorch's; its graphs are kept, and never stale, damaged or half there."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.data.fitting import network_slices
from scripts.data.phantoms import make_phantom
from scripts.data.preprocessing import scale_intensity
from scripts.engines import runtimes
from scripts.engines.inferers import ClassPromptInferer
from scripts.engines.runtimes import (
    OnnxNetwork,
    _whole_folder,
    choose_runtime,
)
from scripts.errors import ConfigError, OutputError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import load_network_weights
from scripts.networks.model_card import ModelCard
from scripts.networks.prompts import PromptEmbeddings

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # what other sums in other orders may change; in bfloat16 it would be 1e-2


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(class_ids=(1, 2, 4)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Where weights would lie; the graphs beside it are shared by the tests that do not change them."""
    return tmp_path_factory.mktemp("weights") / "model.pt"


@pytest.fixture(scope="module")
def runtime(network, checkpoint):
    return OnnxNetwork(network, checkpoint=checkpoint)


def images(count, size=32, seed=1):
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


def all_classes(model, slices):
    """The logits of all that a model knows, whichever computes it."""
    embedding = model.encode_image(slices)
    return model.decode(embedding, model.encode_classes(embedding, torch.tensor([model.class_ids] * len(slices))))[0]


def graphs(folder: Path) -> dict[str, float]:
    """The kept graphs with the time of their making."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / ".runtime").rglob("graph.onnx")}


# ------------------------------------------------------------------------------------------------- the same function


def test_what_the_network_says_of_itself_is_unchanged(runtime, network):
    assert (runtime.image_size, runtime.grid_size, runtime.class_ids, runtime.diffusion_steps) == (32, 4, (1, 2, 4), 1)


@pytest.mark.parametrize("count", [1, 3])
def test_embeddings_are_those_of_pytorch(runtime, network, count):
    image = images(count)
    expected = network.encode_image(image)
    assert expected.std() > 0.1
    torch.testing.assert_close(runtime.encode_image(image), expected, **CLOSE)


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("noisy", [False, True])
def test_prompts_and_masks_are_those_of_pytorch(build_network, runtime, network, checkpoint, generator, preset, noisy):
    """Five classes are a group and one more; without class 3 among the first, ids and places differ."""
    if preset == "release":
        network = build_network(preset=preset, diffusion_steps=3).eval().requires_grad_(False)
        runtime = OnnxNetwork(network, checkpoint=checkpoint)
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
def test_the_inferer_takes_it_in_the_networks_place(network, checkpoint, generator, shape, noise_seed):
    image = torch.rand((1, *shape), generator=generator) * 255
    expected, logits = (
        ClassPromptInferer(noise_seed=noise_seed, runtime=name, checkpoint=str(checkpoint))(
            image, network, class_ids=[4, 1]
        )
        for name in ("torch", "onnx")
    )
    torch.testing.assert_close(logits, expected, rtol=2e-3, atol=1e-3)  # in half precision
    assert graphs(checkpoint.parent)


@pytest.mark.slow
def test_masks_of_phantoms_are_those_of_pytorch(phantom_model, tmp_path):
    """The phantoms' model on two of them, all its classes: DSC 0.999 or more, logits to 1e-3."""
    weights = phantom_model
    network = AutoMedSAM(**ModelCard.beside(weights).network).eval().requires_grad_(False)
    load_network_weights(network, weights)
    runtime = OnnxNetwork(network, checkpoint=tmp_path / "model.pt")
    for seed in (5, 6):
        phantom = make_phantom(np.random.default_rng(seed), size=64, slices=12)
        values = torch.from_numpy(phantom.hu.astype(np.float32))[None]  # (1, X, Y, D)
        image = scale_intensity(values, modality="CT", window=(40.0, 400.0))[..., 3:9]
        slices = network_slices(image, network.image_size)
        expected, logits = (all_classes(model, slices) for model in (network, runtime))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        first, second = expected > 0, logits > 0
        assert first.sum() > 500
        overlap = 2 * (first & second).sum((0, 2, 3)) / (first.sum((0, 2, 3)) + second.sum((0, 2, 3))).clamp(min=1)
        asked = first.sum((0, 2, 3)) > 0
        assert (overlap[asked] >= 0.999).all()


def test_a_callers_mixed_precision_does_not_get_into_the_graph(network, tmp_path):
    image = images(1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = OnnxNetwork(network, checkpoint=tmp_path / "model.pt").encode_image(image)
    torch.testing.assert_close(embedding, network.encode_image(image), **CLOSE)


def test_a_training_network_is_exported_as_it_predicts_and_stays_in_training(build_network, tmp_path):
    network = build_network(image_encoder="lite_medsam", image_size=28, train_image_encoder=True).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    embedding = OnnxNetwork(network, checkpoint=tmp_path / "model.pt").encode_image(images(1, size=28))
    assert network.training
    assert network.image_encoder.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(embedding, network.eval().encode_image(images(1, size=28)), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"image_encoder": "sam_vit_b", "image_size": 32},
        {"image_encoder": "mobile_sam", "image_size": 32, "pixel_normalisation": "sam"},
        {"image_size": 96},
        {"image_encoder": "compact_detailed"},
        {"prompt_branches": "dense"},
        {"prompt_branches": "sparse"},
        {"diffusion": False},
    ],
    ids=str,
)
def test_every_kind_of_network_is_the_same(build_network, tmp_path, settings):
    network = build_network(**settings).eval().requires_grad_(False)
    runtime = OnnxNetwork(network, checkpoint=tmp_path / "model.pt")
    slices = images(2, size=network.image_size)
    torch.testing.assert_close(all_classes(runtime, slices), all_classes(network, slices), **CLOSE)


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


def test_a_graph_is_made_once_and_found_again(network, runtime, checkpoint, caplog):
    expected = runtime.encode_image(images(1))
    before = graphs(checkpoint.parent)
    with caplog.at_level(logging.INFO):
        again = OnnxNetwork(network, checkpoint=checkpoint).encode_image(images(1))
    assert torch.equal(again, expected)
    assert graphs(checkpoint.parent) == before
    assert "exported" not in caplog.text


@pytest.mark.parametrize("name", ["graph.onnx", "sha256"])
def test_a_damaged_graph_is_named_and_made_anew(network, tmp_path, caplog, name):
    checkpoint = tmp_path / "model.pt"
    expected = OnnxNetwork(network, checkpoint=checkpoint).encode_image(images(1))
    (file,) = tmp_path.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert torch.equal(OnnxNetwork(network, checkpoint=checkpoint).encode_image(images(1)), expected)
    assert f"{file.parent} is damaged" in caplog.text
    assert bytes(content) != file.read_bytes()


def test_other_weights_are_another_graph(build_network, tmp_path):
    """Loaded later, loaded anew or changed in place: never the graph of the weights before."""
    network = build_network().eval().requires_grad_(False)
    runtime = OnnxNetwork(network, checkpoint=tmp_path / "model.pt")
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


def test_where_the_weights_folder_cannot_be_written_the_users_cache_is(network, no_room, caplog):
    with caplog.at_level(logging.INFO):
        embedding = OnnxNetwork(network, checkpoint=no_room / "model.pt").encode_image(images(1))
    torch.testing.assert_close(embedding, network.encode_image(images(1)), **CLOSE)
    (graph,) = (no_room / "cache" / "automedsam" / "runtime").rglob("graph.onnx")
    assert str(graph.parent) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        OnnxNetwork(network, checkpoint=no_room / "model.pt").encode_image(images(1))
    assert "exported" not in caplog.text


def test_where_neither_can_be_written_the_error_names_both(network, no_room):
    (no_room / "cache").write_text("")
    with pytest.raises(OutputError, match=r"\.runtime.*cache.*--runtime torch") as error:
        OnnxNetwork(network, checkpoint=no_room / "model.pt").encode_image(images(1))
    assert "\n" not in str(error.value)


def test_a_broken_off_writing_leaves_nothing(tmp_path):
    def break_off():
        with _whole_folder(tmp_path / "graph") as temporary:
            (temporary / "graph.onnx").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_one_stays(tmp_path):
    for content in ("first", "second"):
        with _whole_folder(tmp_path / "graph") as temporary:
            (temporary / "graph.onnx").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
    assert (tmp_path / "graph" / "graph.onnx").read_text() == "first"


# ---------------------------------------------------------------------------------------------------------- choices


def test_torch_is_the_network_itself(network, tmp_path):
    assert choose_runtime(network, runtime="torch", checkpoint=tmp_path / "model.pt") is network


def test_onnx_is_the_other_runtime(network, tmp_path):
    chosen = choose_runtime(network, runtime="onnx", checkpoint=tmp_path / "model.pt")
    assert isinstance(chosen, OnnxNetwork)
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is needed


def test_an_unknown_runtime_is_refused(network, tmp_path):
    with pytest.raises(ConfigError, match="torch, onnx, not 'tensorrt'"):
        choose_runtime(network, runtime="tensorrt", checkpoint=tmp_path / "model.pt")


def test_a_missing_package_says_how_to_install_it(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        choose_runtime(network, runtime="onnx", checkpoint=tmp_path / "model.pt")


def test_a_network_elsewhere_than_on_the_cpu_is_refused(build_network, tmp_path):
    runtime = OnnxNetwork(build_network().to("meta"), checkpoint=tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="on meta: --device cpu"):
        runtime.encode_image(images(1))


def test_many_prompts_go_through_in_groups(runtime, network, generator, monkeypatch):
    """Groups of four, and what is left: each answer in its prompt's place."""
    monkeypatch.setattr(runtimes, "VALUES_TOGETHER", 4 * 256 * 4 * 4)
    embedding, class_ids = torch.randn((2, 256, 4, 4), generator=generator), torch.arange(1, 27).reshape(2, 13)
    assert [some for image, some in runtime._groups(2, 13) if image] == [
        slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)
    ]  # fmt: skip
    expected, prompts = (model.encode_classes(embedding, class_ids) for model in (network, runtime))
    torch.testing.assert_close(tuple(prompts), tuple(expected), **CLOSE)
    torch.testing.assert_close(runtime.decode(embedding, prompts), network.decode(embedding, expected), **CLOSE)


def test_the_largest_grid_still_takes_a_prompt_at_a_time(runtime, monkeypatch):
    monkeypatch.setattr(runtimes, "VALUES_TOGETHER", 1)
    assert list(runtime._groups(1, 2)) == [(0, slice(0, 1)), (0, slice(1, 2))]


def test_no_prompt_and_no_image_have_no_answer(runtime):
    prompts = runtime.encode_classes(torch.zeros(2, 256, 4, 4), torch.empty((2, 0), dtype=torch.int64))
    assert [tuple(values.shape) for values in prompts] == [(0, 2, 256), (0, 256, 4, 4)]
    assert runtime.encode_image(torch.empty(0, 3, 32, 32)).shape == (0, 256, 4, 4)


def test_the_exporter_keeps_to_itself_and_is_heard_again(network, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        OnnxNetwork(network, checkpoint=tmp_path / "model.pt").encode_image(images(1))
        logging.getLogger("onnxscript").warning("heard")
    assert {record.name for record in caplog.records} == {"scripts.engines.runtimes", "onnxscript"}


def test_a_missing_exporter_says_how_to_install_it(network, tmp_path, monkeypatch):
    found = runtimes.importlib.util.find_spec
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(ConfigError, match="pip install onnx, or"):
        OnnxNetwork(network, checkpoint=tmp_path / "model.pt").encode_image(images(1))


def test_another_number_of_threads_is_followed(runtime):
    before = torch.get_num_threads()
    session = runtime._session("encode_image")
    try:
        torch.set_num_threads(before + 1)
        assert runtime._session("encode_image") is not session
    finally:
        torch.set_num_threads(before)
    assert runtime._session("encode_image").get_session_options().intra_op_num_threads == before
