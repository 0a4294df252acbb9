"""The encoders' levels and the prompts in their attention, against plain attention written out with einsum."""

import copy
from typing import Any

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.errors import InputError
from scripts.networks.image_encoders import sam_vit
from scripts.networks.image_encoders.compact import CompactEncoder
from scripts.networks.image_encoders.levels import apply_block, ask_image
from scripts.networks.image_encoders.sam_vit import FusedAttention, SamVit, VitSize
from scripts.networks.image_encoders.tiny_vit import AttentionBlock, WindowAttention, lite_medsam_encoder

GRIDS = [(1, 1), (3, 5), (8, 2), (7, 7)]
SHARES = [1, 40, 2**19]  # biases for each of two threads: one row of one head, up to all at once
TINY = VitSize(channels=32, blocks=5, heads=2, global_blocks=(1, 3, 4))
SIZES = {"sam_vit": 64, "tiny_vit": 32, "compact": 32}


def fill(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)


def tiny_encoder(name: str, generator: torch.Generator) -> Any:
    """An encoder of each family with random weights, in which batches are as images one by one."""
    if name == "sam_vit":
        encoder: nn.Module = SamVit(TINY, image_size=SIZES[name])
        fill(encoder, generator)
        return encoder.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = lite_medsam_encoder(image_size=32) if name == "tiny_vit" else CompactEncoder(image_size=32)
        for module in encoder.modules():
            if isinstance(module, WindowAttention):
                nn.init.normal_(module.attention_biases)
    return encoder.eval()


def prompts_for(encoder: Any, generator: torch.Generator, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn((count, channels), generator=generator) for channels in encoder.level_channels]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


class LargestTensor(TorchDispatchMode):
    """Notes how many values the largest result of any operation has."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.values = max(self.values, *sizes, 0)
        return result


def plain_attention(
    attention: FusedAttention, tokens: torch.Tensor, prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full attention among the image tokens and prompts of each image, the bias written out pair by pair.

    Returns:
        The outputs `(B, h w + N, channels)`, the scores before the softmax and the image's share for each prompt.
    """
    count, height, width, channels = tokens.shape
    length, heads = height * width, attention.num_heads
    joined = torch.cat((tokens.reshape(count, length, channels), prompts[None].repeat(count, 1, 1)), dim=1)
    query, key, value = attention.qkv(joined).split(channels, dim=2)
    query, key, value = (part.reshape(count, -1, heads, channels // heads) for part in (query, key, value))
    scores = torch.einsum("blhc,bmhc->bhlm", query, key) / (channels // heads) ** 0.5
    bias = torch.zeros_like(scores)
    for i in range(length):
        for j in range(length):
            down, right = i // width - j // width, i % width - j % width
            table = attention.rel_pos_h[down + height - 1] + attention.rel_pos_w[right + width - 1]
            bias[:, :, i, j] = query[:, i] @ table
    mixed = torch.einsum("bhlm,bmhc->blhc", (scores + bias).softmax(dim=-1), value).flatten(2)
    shares = scores[:, :, length:, :length].softmax(dim=-1).mean(dim=1)
    return attention.proj(mixed), scores, shares.reshape(count, -1, height, width)


def fused_attention(grid: tuple[int, int], generator: torch.Generator) -> FusedAttention:
    attention = FusedAttention(Attention(24, num_heads=3, use_rel_pos=True, input_size=grid))
    fill(attention, generator)
    return attention


# SAM's attention.


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("prompts", [0, 1, 4])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_prompts_join_the_attention_and_the_bias_stays_with_the_image(
    grid, count, prompts, share, generator, monkeypatch
):
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", share)
    attention = fused_attention(grid, generator)
    tokens = torch.randn(count, *grid, 24, generator=generator)
    own = torch.randn(prompts, 24, generator=generator)
    with torch.no_grad():
        expected, _, shares = plain_attention(attention, tokens, own)
        mixed, answer = attention.attend_with_prompts(tokens, own, ask=True)
        silent, none = attention.attend_with_prompts(tokens, own)
    length = grid[0] * grid[1]
    assert_close(mixed.flatten(1, 2), expected[:, :length])
    assert torch.equal(silent, mixed)
    assert none is None
    if not prompts:
        assert answer is None
        return
    assert_close(answer.tokens, expected[:, length:])
    assert_close(answer.attention, shares)
    torch.testing.assert_close(answer.attention.sum(dim=(2, 3)), torch.ones(count, prompts))


def test_without_prompts_the_attention_is_the_one_without(generator):
    attention = fused_attention((5, 6), generator)
    tokens = torch.randn(2, 5, 6, 24, generator=generator)
    with torch.no_grad():
        mixed, _ = attention.attend_with_prompts(tokens, torch.zeros(0, 24))
        assert_close(mixed, attention(tokens), 1e-6)


def test_gradients_through_the_prompts_are_those_of_plain_attention(generator, monkeypatch):
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", 40)
    fused = fused_attention((4, 3), generator)
    plain = copy.deepcopy(fused)
    tokens = torch.randn(2, 4, 3, 24, generator=generator)
    gradients = []
    for attention in (fused, plain):
        own = torch.full((2, 24), 0.3).requires_grad_()
        if attention is fused:
            mixed, answer = attention.attend_with_prompts(tokens, own, ask=True)
            outputs = torch.cat((mixed.flatten(1, 2), answer.tokens), dim=1)
        else:
            outputs, _, _ = plain_attention(attention, tokens, own)
        (outputs * torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape)).sum().backward()
        gradients.append([own.grad, *(parameter.grad for parameter in attention.parameters())])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 1e-4)


def test_with_prompts_too_the_biases_are_never_held_all_at_a_time(generator, monkeypatch):
    grid, heads, prompts = 24, 3, 16
    attention = fused_attention((grid, grid), generator)
    tokens = torch.randn(1, grid, grid, 24, generator=generator)
    held = 2 * 4 * grid**3  # eight rows of queries of one head
    monkeypatch.setattr(sam_vit, "BIASES_PER_THREAD", held // max(2, torch.get_num_threads()))
    with torch.no_grad(), LargestTensor() as largest:
        attention.attend_with_prompts(tokens, torch.randn(prompts, 24, generator=generator))
    assert largest.values <= held * (grid**2 + prompts) / grid**2
    assert largest.values < heads * grid**4 / 8


def test_the_prompts_attend_as_written_out(generator):
    query = torch.randn(2, 3, 4, 8, generator=generator)
    key, value = (torch.randn(2, 3, 10, 8, generator=generator) for _ in range(2))
    mixed, shares = ask_image(query, key, value, (2, 3))
    scores = torch.einsum("bhnc,bhmc->bhnm", query, key) / 8**0.5
    expected = torch.einsum("bhnm,bhmc->bnhc", scores.softmax(dim=3), value).reshape(2, 4, 24)
    assert_close(mixed, expected)
    assert_close(shares, scores[..., :6].softmax(dim=3).mean(dim=1).reshape(2, 4, 2, 3))


# TinyViT's attention in windows.


def plain_window_attention(attention: WindowAttention, tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The outputs `(count, L + N, channels)` of windows `(count, L, channels)`; only the image has a bias."""
    count, length, channels = tokens.shape
    width = channels // attention.heads
    joined = torch.cat((attention.norm(tokens), prompts[None].repeat(count, 1, 1)), dim=1)
    projected = attention.qkv(joined).reshape(count, -1, attention.heads, 3, width)
    query, key, value = projected.unbind(3)
    scores = torch.einsum("blhc,bmhc->bhlm", query, key) / width**0.5
    side = int(length**0.5)
    for i in range(length):
        for j in range(length):
            offset = abs(i // side - j // side) * side + abs(i % side - j % side)
            scores[:, :, i, j] += attention.attention_biases[:, offset]
    return attention.proj(torch.einsum("bhlm,bmhc->blhc", scores.softmax(dim=3), value).flatten(2))


@pytest.mark.parametrize("prompts", [0, 1, 5])
@pytest.mark.parametrize("count", [1, 6])
def test_prompts_join_every_window(count, prompts, generator):
    attention = WindowAttention(12, heads=3, window=3)
    fill(attention, generator)
    tokens = torch.randn(count, 9, 12, generator=generator)
    own = torch.randn(prompts, 12, generator=generator)
    with torch.no_grad():
        expected = plain_window_attention(attention, tokens, own)[:, :9]
        assert_close(attention.attend_with_prompts(tokens, own), expected)


def test_the_prompts_of_windows_attend_to_the_whole_image(generator):
    attention = WindowAttention(12, heads=3, window=2)
    fill(attention, generator)
    tokens, own = torch.randn(2, 3, 5, 12, generator=generator), torch.randn(4, 12, generator=generator)
    with torch.no_grad():
        answer = attention.answer(tokens, own)
        unbiased = copy.deepcopy(attention)
        unbiased.attention_biases.zero_()
        image = torch.cat((attention.norm(tokens).flatten(1, 2), own[None].repeat(2, 1, 1)), dim=1)
        query, key, value = attention.qkv(image).reshape(2, 19, 3, 3, 4).unbind(3)
        scores = torch.einsum("blhc,bmhc->bhlm", query[:, 15:], key) / 4**0.5
        mixed = torch.einsum("bhlm,bmhc->blhc", scores.softmax(dim=3), value).flatten(2)
    assert_close(answer.tokens, attention.proj(mixed))
    assert_close(answer.attention, scores[..., :15].softmax(dim=3).mean(dim=1).reshape(2, 4, 3, 5))


@pytest.mark.parametrize("grid", [(7, 7), (4, 9), (8, 3)])  # windows of 7 divide only the first
def test_a_block_without_prompts_is_the_published_one(grid, generator):
    block = AttentionBlock(24, heads=3, window=7).eval()
    fill(block, generator)
    features = torch.randn(2, 24, *grid, generator=generator)
    with torch.no_grad():
        level = block.with_prompts(features, torch.zeros(0, 24), ask=True)
        assert_close(level.features, block(features), 1e-6)
    assert level.answer is None


# The levels.


@pytest.mark.parametrize("name", SIZES)
def test_without_prompts_the_neck_makes_the_embedding_of_the_last_level(name, generator):
    encoder = tiny_encoder(name, generator)
    image = torch.rand(2, 3, SIZES[name], SIZES[name], generator=generator)
    with torch.no_grad():
        levels = encoder.levels(image, prompts_for(encoder, generator, 0))
        assert_close(encoder.neck(levels[-1].features), encoder(image))
    for level, channels in zip(levels, encoder.level_channels, strict=True):
        side = level.features.shape[2]
        assert level.features.shape == (2, channels, side, side)
        assert side % encoder.grid_size == 0
        assert level.answer is None
    assert levels[-1].features.shape[2] == encoder.grid_size


@pytest.mark.parametrize("name", SIZES)
def test_a_level_feels_its_own_prompts_and_those_before(name, generator):
    encoder = tiny_encoder(name, generator)
    image = torch.rand(1, 3, SIZES[name], SIZES[name], generator=generator)
    prompts = prompts_for(encoder, generator)
    with torch.no_grad():
        before = encoder.levels(image, prompts)
        for changed, attends in enumerate(encoder.level_attends):
            others = [own + (index == changed) for index, own in enumerate(prompts)]
            after = encoder.levels(image, others)
            same = [torch.equal(old.features, new.features) for old, new in zip(before, after, strict=True)]
            assert same == [index < changed or not attends for index in range(len(prompts))]


@pytest.mark.parametrize("name", ["sam_vit", "tiny_vit"])
def test_the_answers_belong_to_the_levels_that_attend(name, generator):
    encoder = tiny_encoder(name, generator)
    image = torch.rand(2, 3, SIZES[name], SIZES[name], generator=generator)
    prompts = prompts_for(encoder, generator)
    with torch.no_grad():
        asked = encoder.levels(image, prompts, ask=True)
        silent = encoder.levels(image, prompts)
    for level, quiet, attends in zip(asked, silent, encoder.level_attends, strict=True):
        assert torch.equal(level.features, quiet.features)
        assert quiet.answer is None
        assert (level.answer is not None) == attends
        if level.answer is not None:
            count, channels, height, width = level.features.shape
            assert level.answer.tokens.shape == (count, 3, channels)
            assert level.answer.attention.shape == (count, 3, height, width)
            torch.testing.assert_close(level.answer.attention.sum(dim=(2, 3)), torch.ones(2, 3))
            assert (level.answer.tokens[0] - level.answer.tokens[1]).abs().max() > 1e-4  # two images


@pytest.mark.parametrize("name", SIZES)
def test_levels_of_a_batch_are_those_of_its_images(name, generator):
    encoder = tiny_encoder(name, generator)
    images = torch.rand(3, 3, SIZES[name], SIZES[name], generator=generator)
    prompts = prompts_for(encoder, generator)
    with torch.no_grad():
        together = encoder.levels(images, prompts, ask=True)
        for i in range(3):
            for level, own in zip(together, encoder.levels(images[i : i + 1], prompts, ask=True), strict=True):
                assert_close(level.features[i : i + 1], own.features, 1e-4)
                if own.answer is not None:
                    assert_close(level.answer.tokens[i : i + 1], own.answer.tokens, 1e-4)
                    assert_close(level.answer.attention[i : i + 1], own.answer.attention, 1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(name, generator):
    encoder = tiny_encoder(name, generator)
    image = torch.rand(1, 3, SIZES[name], SIZES[name], generator=generator)
    prompts = [own.requires_grad_() for own in prompts_for(encoder, generator)]
    learning = [*encoder.parameters(), *prompts]
    gradients, kept = [], []
    for checkpointing in (False, True):
        values: list[int] = []

        def note(tensor: torch.Tensor, values: list[int] = values) -> torch.Tensor:
            values.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            levels = encoder.levels(image, prompts, ask=True, checkpointing=checkpointing)
        sums = [level.features.square().mean() for level in levels]
        sums += [level.answer.tokens.square().mean() for level in levels if level.answer is not None]
        gradients.append(torch.autograd.grad(sum(sums), learning, allow_unused=True))
        kept.append(sum(values))
    for found, expected in zip(*gradients, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert kept[1] < kept[0] / 2


def test_a_block_is_applied_with_or_without_checkpointing():
    values = torch.ones(3, requires_grad=True)
    for checkpointing in (False, True):
        (gradient,) = torch.autograd.grad(apply_block(torch.exp, values, checkpointing=checkpointing).sum(), values)
        torch.testing.assert_close(gradient, torch.ones(3).exp())


@pytest.mark.parametrize("name", SIZES)
def test_images_of_another_shape_are_refused(name, generator):
    encoder = tiny_encoder(name, generator)
    with pytest.raises(InputError, match=r"\(B, 3"):
        encoder.levels(torch.zeros(1, 3, SIZES[name], 2 * SIZES[name]), prompts_for(encoder, generator))
