"""Compiled parts give the same answers under the same names; mixed precision only where a processor has it."""

import platform
from pathlib import Path

import pytest
import torch
from monai.inferers import SimpleInferer

from scripts.engines.acceleration import compile_parts, cpu_has_bfloat16, in_precision, on_device, require_bfloat16
from scripts.errors import ConfigError
from scripts.losses.joint import JointLoss, PromptTargets

CPU = torch.device("cpu")


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_compiled_parts_give_the_same_answers_under_the_same_names(build_network, preset, generator):
    network = build_network(class_ids=(1, 2, 4), preset=preset).eval().requires_grad_(False)
    names = list(network.state_dict())
    size = network.image_size
    image = torch.rand((2, 3, size, size), generator=generator)
    ids = torch.tensor([[1, 4], [2, 1]])
    noise = torch.randn((2, 2, 256, network.grid_size, network.grid_size), generator=generator)
    plain, noisy = network(image, ids).logits, network(image, ids, noise=noise).logits
    compile_parts(network, backend="aot_eager")
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(image, ids).logits, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(image, ids, noise=noise).logits, noisy, rtol=1e-4, atol=1e-5)


def test_compiled_parts_are_those_that_run(build_network, generator):
    network = build_network().eval().requires_grad_(False)
    seen = []

    def backend(graph, inputs):
        seen.append(len(inputs))
        return graph.forward

    compile_parts(network, backend=backend)
    size = network.image_size
    embedding = network.encode_image(torch.rand((1, 3, size, size), generator=generator))
    encoder = len(seen)
    prompts = network.encode_classes(embedding, torch.tensor([[1]]))
    class_prompts = len(seen)
    network.decode(embedding, prompts)
    assert 0 < encoder < class_prompts < len(seen)


def test_a_network_comes_to_its_device(build_network):
    network = build_network()
    assert on_device(network, device=CPU) is network


def test_compiling_is_for_cuda(build_network):
    with pytest.raises(ConfigError, match="expected a CUDA device, got cpu"):
        on_device(build_network(), device=CPU, compiled=True)


@pytest.mark.parametrize(("amx", "avx", "expected"), [(True, False, True), (False, True, True), (False, False, False)])
def test_either_instruction_set_will_do(monkeypatch, amx, avx, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    assert cpu_has_bfloat16() is expected
    if not expected:
        with pytest.raises(ConfigError, match="use float32"):
            require_bfloat16(CPU)


def test_a_pytorch_that_cannot_tell_counts_as_no(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert cpu_has_bfloat16() is False


def test_this_pytorch_has_the_probes():
    assert all(hasattr(torch.cpu, probe) for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


@pytest.mark.skipif(platform.system() != "Linux", reason="the processor's flags are read from Linux")
def test_the_probe_says_what_the_system_says():
    text = Path("/proc/cpuinfo").read_text()
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    assert cpu_has_bfloat16() == bool({"amx_bf16", "avx512_bf16"} & set(flags))


def gradients_in(precision, network, images, ids):
    """One step of training: the logits, and the gradient of each part's first weight."""
    inferer = in_precision(SimpleInferer(), precision=precision, device=CPU)
    answer = inferer(images, network, ids)
    targets = PromptTargets(torch.ones_like(answer.logits), torch.ones_like(answer.logits), torch.ones(ids.shape) > 0)
    JointLoss(losses=["dice", "cross_entropy"])(answer, targets).backward()
    parts = (network.image_encoder, network.class_prompt_encoder.unet, network.mask_decoder.output_upscaling)
    gradients = [next(part.parameters()).grad.clone() for part in parts]
    network.zero_grad()
    return answer.logits.detach().float(), gradients


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this processor has no instructions for bfloat16")
def test_training_in_bfloat16_learns_what_float32_learns(build_network, generator):
    network = build_network(train_image_encoder=True)
    images = torch.rand((2, 3, network.image_size, network.image_size), generator=generator)
    ids = torch.tensor([[1, 2], [2, 1]])
    exact, exact_gradients = gradients_in("float32", network, images, ids)
    near, gradients = gradients_in("bfloat16", network, images, ids)
    assert not torch.equal(near, exact)  # it was at work
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    for found, expected in zip(gradients, exact_gradients, strict=True):
        assert found.dtype == torch.float32
        # Processors round and sum in ways of their own: 0.977 has been seen. Of other weights it would be near 0.
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


def test_float32_is_the_inferer_as_it_is():
    inferer = SimpleInferer()
    assert in_precision(inferer, precision="float32", device=CPU) is inferer


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="precision is 'float32' or 'bfloat16', not 'float16'"):
        in_precision(SimpleInferer(), precision="float16", device=CPU)


def test_training_in_bfloat16_is_refused_where_it_is_not_at_home(monkeypatch):
    monkeypatch.setattr("scripts.engines.acceleration.cpu_has_bfloat16", lambda: False)
    with pytest.raises(ConfigError, match="use float32"):
        in_precision(SimpleInferer(), precision="bfloat16", device=CPU)
