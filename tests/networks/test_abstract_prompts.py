"""Abstract prompts outside the encoder: their mapping to tokens, and the attention of convolutional levels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scripts.networks.abstract_prompts import LevelAttention, PromptMapping


def seeded(build: type[nn.Module], *arguments: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*arguments)


# The mapping.


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_each_prompt_goes_through_the_shared_layers_and_its_own(prompts, count, generator):
    mapping = seeded(PromptMapping, 16, prompts)
    values = torch.randn(count, prompts, 16, generator=generator)
    found = mapping(values)
    assert found.shape == (count, prompts, 256)
    weights = dict(mapping.named_parameters())

    def layer(name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for image in range(count):
        for index in range(prompts):
            hidden = layer("shared.2", layer("shared.0", values[image, index]).clamp(min=0)).clamp(min=0)
            hidden = layer("shared.4", hidden)
            for step in range(2):
                hidden = layer(f"own.{index}.layers.{step}", hidden).clamp(min=0)
            expected = layer(f"own.{index}.layers.2", hidden)
            torch.testing.assert_close(found[image, index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("channels", "prompts"), [(768, 2), (1280, 2), (32, 16)])
def test_the_widths_of_the_mapping(channels, prompts):
    with torch.device("meta"):
        mapping = PromptMapping(channels, prompts)
    widths = [layer.out_features for layer in mapping.shared if isinstance(layer, nn.Linear)]
    assert widths == [channels // 4, channels // 4, 256]
    assert [[layer.out_features for layer in own.layers] for own in mapping.own] == [[64, 64, 256]] * prompts


def test_the_count_for_vit_h():
    with torch.device("meta"):
        mapping = PromptMapping(1280, 2)
    assert sum(parameter.numel() for parameter in mapping.parameters()) == 669_312


# The attention of a convolutional level.


@pytest.mark.parametrize("prompts", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 4)])
def test_image_and_prompts_attend_to_one_another(grid, prompts, generator):
    attention = seeded(LevelAttention, 64)
    features = torch.randn(2, 64, *grid, generator=generator)
    own = torch.randn(prompts, 64, generator=generator)
    level = attention(features, own, ask=True)
    length = grid[0] * grid[1]
    tokens = F.layer_norm(features.flatten(2).transpose(1, 2), (64,), attention.norm.weight, attention.norm.bias)
    joined = torch.cat((tokens, own[None].repeat(2, 1, 1)), dim=1)
    query, key, value = attention.qkv(joined).split(64, dim=2)
    query, key, value = (part.reshape(2, -1, 2, 32) for part in (query, key, value))  # two heads
    scores = torch.einsum("blhc,bmhc->bhlm", query, key) / 32**0.5
    mixed = attention.proj(torch.einsum("bhlm,bmhc->blhc", scores.softmax(dim=3), value).flatten(2))
    expected = features + mixed[:, :length].transpose(1, 2).reshape(features.shape)
    torch.testing.assert_close(level.features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(level.answer.tokens, mixed[:, length:], rtol=1e-4, atol=1e-5)
    shares = scores[:, :, length:, :length].softmax(dim=3).mean(dim=1).reshape(2, prompts, *grid)
    torch.testing.assert_close(level.answer.attention, shares, rtol=1e-4, atol=1e-6)


def test_what_is_not_asked_for_is_not_given(generator):
    attention = seeded(LevelAttention, 32)
    features, own = torch.randn(2, 32, 3, 3, generator=generator), torch.randn(2, 32, generator=generator)
    silent = attention(features, own)
    assert silent.answer is None
    assert torch.equal(silent.features, attention(features, own, ask=True).features)


def test_the_order_of_the_prompts_does_not_matter_to_the_image(generator):
    attention = seeded(LevelAttention, 32)
    features, own = torch.randn(1, 32, 3, 3, generator=generator), torch.randn(3, 32, generator=generator)
    level, turned = attention(features, own, ask=True), attention(features, own.flip(0), ask=True)
    torch.testing.assert_close(level.features, turned.features)
    torch.testing.assert_close(level.answer.tokens, turned.answer.tokens.flip(1))
    assert (level.features - attention(features, own[:1]).features).abs().max() > 1e-3
