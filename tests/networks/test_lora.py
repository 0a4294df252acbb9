"""LoRA's updates: which rows they touch, what merging changes, and that the published names can be had."""

import copy

import pytest
import torch
from torch import nn

from scripts.errors import ConfigError
from scripts.networks.image_encoders.compact import CompactEncoder
from scripts.networks.image_encoders.sam_vit import SamVit, VitSize
from scripts.networks.image_encoders.tiny_vit import lite_medsam_encoder
from scripts.networks.lora import (
    LowRankUpdate,
    add_low_rank_updates,
    fused_attentions,
    merge_low_rank_updates,
    published_state,
)

TINY = VitSize(channels=24, blocks=2, heads=3, global_blocks=(1,))


def encoder_named(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SamVit(TINY, image_size=32) if name == "sam_vit" else lite_medsam_encoder(image_size=32)
    return encoder.eval().requires_grad_(False)


def shake(encoder: nn.Module, generator: torch.Generator) -> None:
    """Give all that learns random values, as training would."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1, generator=generator)


@pytest.mark.parametrize(("groups", "query", "value"), [(1, range(6), range(12, 18)), (2, None, None)])
def test_the_update_reaches_query_and_value_rows(groups, query, value, generator):
    if groups == 2:  # each head has three rows of query, then of key, then of value
        query, value = [0, 1, 2, 9, 10, 11], [6, 7, 8, 15, 16, 17]
    update = LowRankUpdate(6, rank=2, groups=groups)
    shake(update, generator)
    weight = torch.randn(18, 6, generator=generator)
    added = update(weight) - weight
    torch.testing.assert_close(added[list(query)], update.query_up @ update.query_down)
    torch.testing.assert_close(added[list(value)], update.value_up @ update.value_down)
    untouched = sorted({*range(18)} - {*query} - {*value})
    assert len(untouched) == 6
    assert torch.equal(update(weight)[untouched], weight[untouched])


def test_at_first_the_update_is_nothing(generator):
    update = LowRankUpdate(6, rank=2, groups=1)
    weight = torch.randn(18, 6, generator=generator)
    assert torch.equal(update(weight), weight)
    assert update.query_down.abs().min() > 0
    assert not torch.equal(update.query_down, update.value_down)


@pytest.mark.parametrize("rank", [-1, 0, 7])
def test_other_ranks_are_refused(rank):
    with pytest.raises(ConfigError, match=f"6 channels.*not {rank}"):
        LowRankUpdate(6, rank=rank, groups=1)


@pytest.mark.parametrize(("name", "layers"), [("sam_vit", 2), ("tiny_vit", 10)])
def test_every_attention_gets_updates_and_they_alone_learn(name, layers):
    encoder = encoder_named(name)
    widths = [attention.qkv.in_features for attention in fused_attentions(encoder)]
    assert add_low_rank_updates(encoder, rank=4) == layers == len(widths)
    learning = {key: value for key, value in encoder.named_parameters() if value.requires_grad}
    assert len(learning) == 4 * layers
    assert all(".qkv.parametrizations.weight.0." in key for key in learning)
    assert sum(value.numel() for value in learning.values()) == sum(4 * 4 * width for width in widths)


def test_an_encoder_without_attention_gets_none():
    encoder = CompactEncoder(image_size=16)
    before = list(encoder.state_dict())
    assert add_low_rank_updates(encoder, rank=4) == 0
    assert list(encoder.state_dict()) == before


@pytest.mark.parametrize(("name", "size"), [("sam_vit", 32), ("tiny_vit", 32)])
def test_merging_gives_the_same_output_under_the_published_names(name, size, generator):
    encoder = encoder_named(name)
    untouched = copy.deepcopy(encoder)
    image = torch.rand(2, 3, size, size, generator=generator)
    add_low_rank_updates(encoder, rank=4)
    with torch.no_grad():
        assert torch.equal(encoder(image), untouched(image))
        shake(encoder, generator)
        adapted = encoder(image)
        merge_low_rank_updates(encoder)
        merged = encoder(image)
        assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()
        assert (merged - untouched(image)).abs().max() > 1e-3 * merged.abs().max()
    shapes = {key: value.shape for key, value in encoder.state_dict().items()}
    assert shapes == {key: value.shape for key, value in untouched.state_dict().items()}
    merge_low_rank_updates(encoder)  # once is enough, twice does no harm
    with torch.no_grad():
        assert torch.equal(encoder(image), merged)


@pytest.mark.parametrize("name", ["sam_vit", "tiny_vit"])
def test_the_published_state_leaves_the_updates_out_and_shares_memory(name, generator):
    encoder = encoder_named(name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    add_low_rank_updates(encoder, rank=4)
    shake(encoder, generator)
    state = published_state(encoder)
    assert set(before) == set(state)
    for key, value in before.items():
        assert torch.equal(state[key], value)
    layer = fused_attentions(encoder)[0].qkv
    next(value for key, value in state.items() if key.endswith("qkv.weight")).zero_()
    assert not layer.parametrizations.weight.original.any()


def test_gradients_reach_the_updates_and_not_the_weights(generator):
    encoder = encoder_named("sam_vit")
    add_low_rank_updates(encoder, rank=4)
    shake(encoder, generator)
    encoder(torch.rand(1, 3, 32, 32, generator=generator)).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any().item()) == (".weight.0." in name), name


def test_a_network_with_updates_can_be_copied(generator):
    encoder = encoder_named("sam_vit")
    add_low_rank_updates(encoder, rank=4)
    shake(encoder, generator)
    image = torch.rand(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        twin = copy.deepcopy(encoder)
        expected = encoder(image)
        merge_low_rank_updates(encoder)
        assert torch.equal(twin(image), expected)
    assert len(twin.state_dict()) == len(encoder.state_dict()) + 4 * TINY.blocks
