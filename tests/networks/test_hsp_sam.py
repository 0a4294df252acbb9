"""The prompt-free network: its counts and switches, what learns and is saved, and that it can learn by heart."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import CheckpointError, ConfigError, InputError
from scripts.networks import hsp_sam
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import (
    load_weights,
    resize_positions,
    resize_relative_positions,
    save_state_dict,
)
from scripts.networks.hsp_sam import HSPSAM
from scripts.networks.image_encoders import build_image_encoder
from scripts.networks.image_encoders.sam_vit import SamVit, VitSize
from scripts.networks.lora import published_state
from scripts.networks.mask_decoding import build_mask_decoder, build_prompt_encoder
from scripts.networks.positional_prompts import embed_positions

SIZE = 32
TINY = VitSize(channels=32, blocks=5, heads=2, global_blocks=(0, 1, 3, 4))
TINY_SIZE = 64
ENCODERS = {"tiny_sam_vit": TINY_SIZE, "lite_medsam": SIZE, "compact": SIZE}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"prompts": 0},
    {"prompts": 1},
    {"prompts": 16},
    {"prompt_source": "token_output"},
    {"fusion": "mask_prompt"},
    {"fusion": "none"},
    {"deep_residual": True},
    {"final_image_attention": True},
    {"pixel_normalisation": "sam"},
    {"lora_rank": 0},
    {"class_ids": (2, 5, 3)},
    {"prompt_source": "positional"},
    {"prompt_source": "positional", "prompts": 0},
    {"prompt_source": "positional", "prompts": 16, "class_ids": (1, 2)},
    {"prompt_source": "positional", "fusion": "mask_prompt"},
    {"prompt_source": "positional", "fusion": "none"},
]
NAMES = [",".join(f"{key}={value}" for key, value in settings.items()) or "default" for settings in SWITCHES]


def build_tiny(name: str, *, image_size: int | None = None) -> nn.Module:
    """Any encoder by its name, or a SAM ViT that is small enough for a test."""
    if name == "tiny_sam_vit":
        return SamVit(TINY, image_size=image_size or TINY_SIZE)
    return build_image_encoder(name, image_size=image_size)


@pytest.fixture(autouse=True)
def with_a_tiny_sam_vit(monkeypatch):
    monkeypatch.setattr(hsp_sam, "build_image_encoder", build_tiny)


def network_of(encoder: str = "tiny_sam_vit", *, seed: int = 0, shaken: bool = True, **settings) -> HSPSAM:
    """A seeded network; `shaken` gives LoRA and the tables of positions values, as training would."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chosen = {"image_encoder": encoder, "image_size": ENCODERS[encoder], "lora_rank": 4, **settings}
        network = HSPSAM(**chosen)
        for name, parameter in network.named_parameters():
            if shaken and name.endswith(("_up", "pos_embed", "rel_pos_h", "rel_pos_w")):
                nn.init.normal_(parameter, std=0.05)
    return network.eval()


def images_for(network: HSPSAM, generator: torch.Generator, count: int = 2) -> torch.Tensor:
    return torch.rand((count, 3, network.image_size, network.image_size), generator=generator)


def learning(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# Counts.


@pytest.mark.parametrize(
    ("encoder", "lora", "mapping", "necks"),
    [
        ("sam_vit_b", 1_179_648, 1_240_576, 3_149_824),
        ("sam_vit_h", 5_242_880, 2_687_488, 3_674_112),
    ],
)
def test_the_default_learns_as_many_parameters_as_the_authors(encoder, lora, mapping, necks):
    """By hand from the widths: 25.1 million for ViT-H, 19.1 million for ViT-B, 13.5 of them in the decoder."""
    with torch.device("meta"):
        network = HSPSAM(image_encoder=encoder)
    counts = {name: parameter.numel() for name, parameter in learning(network).items()}
    assert network.image_size == 512
    assert network.grid_size == 32
    assert sum(count for name, count in counts.items() if "parametrizations" in name) == lora
    prompts = ("abstract_prompts.", "mappings.")
    assert sum(count for name, count in counts.items() if name.startswith(prompts)) == mapping
    assert sum(count for name, count in counts.items() if ".neck." in name or name.startswith("necks.")) == necks
    assert sum(count for name, count in counts.items() if name.startswith("decoder.")) == 13_509_736
    assert round(sum(counts.values()) / 1e6, 1) == {"sam_vit_b": 19.1, "sam_vit_h": 25.1}[encoder]


@pytest.mark.parametrize(
    ("encoder", "size", "grid"), [("sam_vit_l", 512, 32), ("lite_medsam", 256, 64), ("mobile_sam", 1024, 64)]
)
def test_every_encoder_has_its_size(encoder, size, grid):
    with torch.device("meta"):
        for source in ("static", "positional"):
            network = HSPSAM(image_encoder=encoder, prompt_source=source)
            assert (network.image_size, network.grid_size) == (size, grid)
            assert network(torch.zeros(1, 3, size, size)).shape == (1, 2, size, size)


# What comes out.


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("settings", SWITCHES, ids=NAMES)
def test_every_switch_segments_and_learns(settings, encoder, generator):
    network = network_of(encoder, **settings).train()
    images = images_for(network, generator)
    logits = network.class_logits(images)
    ids = sorted(settings.get("class_ids", (1,)))
    assert logits.shape == (2, len(ids), network.image_size, network.image_size)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    for name, parameter in learning(network).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):  # the softmax takes no notice of it
            assert parameter.grad.any(), name
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("settings", SWITCHES, ids=NAMES)
def test_a_batch_is_the_same_one_by_one(settings, encoder, generator):
    network = network_of(encoder, **settings)
    images = images_for(network, generator, 3)
    with torch.no_grad():
        together = network.class_logits(images)
        for i in range(3):
            assert_close(together[i : i + 1], network.class_logits(images[i : i + 1]))
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("settings", SWITCHES[1:], ids=NAMES[1:])
def test_every_switch_changes_the_masks(settings, generator):
    plain, switched = network_of(), network_of(**settings)
    wanted = {name: value.shape for name, value in switched.state_dict().items()}
    fitting = {name: value for name, value in plain.state_dict().items() if wanted.get(name) == value.shape}
    switched.load_state_dict(fitting, strict=False)
    images = images_for(plain, generator)
    with torch.no_grad():
        assert (switched.class_logits(images)[:, :1] - plain.class_logits(images)).abs().max() > 1e-6


def test_channels_are_class_ids_behind_the_background(generator):
    network = network_of(class_ids=(5, 2, 3))
    images = images_for(network, generator)
    with torch.no_grad():
        logits, classes = network(images), network.class_logits(images)
    assert network.class_ids == (2, 3, 5)
    assert logits.shape == (2, 6, TINY_SIZE, TINY_SIZE)
    assert not logits[:, 0].any()
    for channel, class_id in enumerate(network.class_ids):
        assert torch.equal(logits[:, class_id], classes[:, channel])
    for unknown in (1, 4):
        assert (logits[:, unknown] == torch.finfo(logits.dtype).min).all()
    assert (classes[:, 0] - classes[:, 1]).abs().max() > 1e-3


def test_the_softmax_is_that_of_the_decoders_masks(generator):
    network = network_of(class_ids=(1, 2))
    masks: list[torch.Tensor] = []
    network.decoder.register_forward_hook(lambda module, inputs, output: masks.append(output))
    with torch.no_grad():
        logits = network(images_for(network, generator))
    assert masks[0].shape == logits.shape  # the background has a mask of its own
    assert masks[0][:, 0].any()
    torch.testing.assert_close(logits.softmax(dim=1), masks[0].softmax(dim=1))


def test_pixels_are_normalised_as_asked(generator):
    sam, unit = network_of(pixel_normalisation="sam"), network_of(pixel_normalisation="unit")
    images = images_for(sam, generator)
    mean = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1) / 255
    deviation = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1) / 255
    with torch.no_grad():
        assert_close(sam(images), unit((images - mean) / deviation))


def test_the_decoder_gets_each_levels_neck_and_prompts(generator):
    network = network_of()
    given: list[tuple] = []
    network.decoder.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    images = images_for(network, generator)
    with torch.no_grad():
        network(images)
        levels = network.encode_levels(images)
        features, prompts, positions, no_mask = given[0]
        for index in range(4):
            neck = network.image_encoder.neck if index == 3 else network.necks[str(index)]
            assert_close(features[index], neck(levels[index].features))
            mapped = network.mappings[str(index)](network.abstract_prompts[str(index)][None])
            assert_close(prompts[index], mapped.repeat(2, 1, 1))
        assert torch.equal(positions, network.prompt_encoder.get_dense_pe())
        assert torch.equal(no_mask.flatten(), network.prompt_encoder.no_mask_embed.weight.flatten())


def test_tokens_of_the_encoders_output_depend_on_the_image(generator):
    for source, differ in (("static", False), ("token_output", True)):
        network = network_of(prompt_source=source)
        given: list[tuple] = []
        network.decoder.register_forward_pre_hook(lambda module, inputs, given=given: given.append(inputs))
        images = images_for(network, generator)
        with torch.no_grad():
            network(images)
            levels = network.encode_levels(images, ask=True)
            for index, tokens in enumerate(given[0][1]):
                assert (not torch.equal(tokens[0], tokens[1])) == differ
                if differ:
                    assert_close(tokens, network.mappings[str(index)](levels[index].answer.tokens))


def test_finer_levels_are_averaged_down_to_the_grid(generator):
    network = network_of("lite_medsam")
    given: list[tuple] = []
    network.decoder.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    images = images_for(network, generator)
    with torch.no_grad():
        network(images)
        second = network.encode_levels(images)[1].features
        assert second.shape == (2, 128, 16, 16)
        averaged = second.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean(dim=(3, 5))
        assert_close(given[0][0][1], network.necks["1"](averaged))


@pytest.mark.parametrize("source", ["token_output", "positional"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_half_precision_is_close_to_single(encoder, source, generator):
    network = network_of(encoder, prompt_source=source)
    images = images_for(network, generator)
    with torch.no_grad():
        exact = network.class_logits(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = network(images)
    assert half.dtype == torch.bfloat16
    assert (half[:, 1:].float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("source", ["static", pytest.param("positional", marks=pytest.mark.slow)])
def test_the_network_exports_with_a_free_batch_axis(source, generator):
    network = network_of(prompt_source=source).merge_lora()
    images = images_for(network, generator)
    with torch.no_grad():
        free = ({0: torch.export.Dim("batch", min=1, max=8)},)
        program = torch.export.export(network, (images,), dynamic_shapes=free)
        assert_close(program.module()(images[:1])[:, 1:], network.class_logits(images[:1]))


def test_prompts_begin_small_and_each_its_own():
    prompts = network_of(prompts=16).abstract_prompts
    assert list(prompts) == ["0", "1", "2", "3"]
    values = torch.stack(list(prompts.values()))
    assert values.shape == (4, 16, 32)
    assert abs(values.std() - 0.02) < 0.002
    assert abs(values.mean()) < 0.002
    assert len(values.flatten(0, 1).unique(dim=0)) == 64


def test_levels_that_nothing_decodes_keep_only_what_the_encoder_takes():
    assert list(network_of(fusion="none").abstract_prompts) == ["0", "1", "2", "3"]
    assert list(network_of("lite_medsam", fusion="none").abstract_prompts) == ["1", "2", "3"]
    compact = network_of("compact", fusion="none")
    assert list(compact.abstract_prompts) == list(compact.mappings) == list(compact.level_attentions) == ["3"]
    assert len(compact.necks) == 0


# Attention maps.


@pytest.mark.parametrize(
    ("encoder", "sides"), [("tiny_sam_vit", [4, 4, 4, 4]), ("lite_medsam", [8, 16, 8, 8]), ("compact", [4, 4, 4, 4])]
)
@pytest.mark.parametrize("source", ["static", "token_output"])
def test_the_maps_show_where_each_prompt_looks(source, encoder, sides, generator):
    network = network_of(encoder, prompts=3, prompt_source=source)
    images = images_for(network, generator)
    with torch.no_grad():
        explained = network.explain(images)
        assert torch.equal(explained.logits, network.class_logits(images))
    assert [explained.attention[level].shape for level in range(4)] == [(2, 3, side, side) for side in sides]
    for maps in explained.attention.values():
        assert (maps >= 0).all()
        torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, 3))


def test_without_prompts_there_is_nothing_to_show(generator):
    network = network_of(prompts=0)
    with torch.no_grad():
        assert network.explain(images_for(network, generator)).attention == {}


# Positional prompts.


@pytest.mark.parametrize("fusion", ["feature_skip", "mask_prompt", "none"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_decoder_gets_the_tokens_of_each_levels_positions(encoder, fusion, generator):
    network = network_of(encoder, prompt_source="positional", prompts=3, fusion=fusion)
    given: list[tuple] = []
    network.decoder.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    images = images_for(network, generator)
    with torch.no_grad():
        explained = network.explain(images)
        assert torch.equal(explained.logits, network.class_logits(images))
        assert explained.attention == {}
        levels = [3] if fusion == "none" else [0, 1, 2, 3]
        assert list(explained.positions) == levels
        for level, features, tokens in zip(levels, *given[0][:2], strict=True):
            expected = network.position_heads[str(level)](features)
            assert all(map(torch.equal, explained.positions[level], expected))
            assert torch.equal(tokens, embed_positions(expected, network.prompt_encoder))
            assert tokens.shape == (2, 3 + 2, 256)
            assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_positional_prompts_leave_the_encoder_alone(encoder, generator):
    plain, positional = network_of(encoder, prompts=0), network_of(encoder, prompt_source="positional", prompts=4)
    fitting = {name: value for name, value in plain.state_dict().items() if name in positional.state_dict()}
    assert len(fitting) == len(plain.state_dict())
    positional.load_state_dict(fitting, strict=False)
    assert len(positional.abstract_prompts) == len(positional.mappings) == 0
    images = images_for(plain, generator, 1)
    with torch.no_grad():
        levels = zip(plain.encode_levels(images), positional.encode_levels(images, ask=True), strict=True)
        for expected, found in levels:
            assert torch.equal(found.features, expected.features)
            assert found.answer is None
        assert not torch.equal(plain(images), positional(images))


@pytest.mark.parametrize("prompts", range(17))
def test_any_number_of_points_goes_with_a_box(prompts, generator):
    network = network_of("compact", prompt_source="positional", prompts=prompts)
    with torch.no_grad():
        explained = network.explain(images_for(network, generator))
    assert explained.logits.isfinite().all()
    for boxes, points, positive in explained.positions.values():
        assert (boxes.shape, points.shape, positive.shape) == ((2, 4), (2, prompts, 2), (2, prompts))


def test_positional_prompts_are_the_same_each_time(generator):
    network, again = (network_of(prompt_source="positional") for _ in range(2))
    images = images_for(network, generator)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(network(images), expected)
        assert torch.equal(again(images), expected)
    assert_close(network(images), expected)  # and with gradients


def test_the_count_of_positional_prompts():
    """148,046 for each level's head in place of abstract prompts and mappings: 18.4 million for ViT-B."""
    with torch.device("meta"):
        network = HSPSAM(prompt_source="positional")
    counts = {name: parameter.numel() for name, parameter in learning(network).items()}
    assert sum(count for name, count in counts.items() if name.startswith("position_heads.")) == 4 * 148_046
    assert sum(counts.values()) == 1_179_648 + 4 * 148_046 + 3_149_824 + 13_509_736


def test_only_abstract_prompts_have_no_positions(generator):
    network = network_of()
    with torch.no_grad():
        assert network.explain(images_for(network, generator)).positions == {}


# What learns.


def test_only_the_updates_the_prompts_the_necks_and_the_decoder_learn():
    network = network_of()
    starts = ("abstract_prompts.", "mappings.", "necks.", "decoder.", "image_encoder.neck.")
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name.startswith(starts) or ".qkv.parametrizations.weight.0." in name), name


@pytest.mark.parametrize(("encoder", "reason"), [("tiny_sam_vit", "learns wholly"), ("compact", "no attention")])
def test_updates_are_left_out_where_they_have_no_place_and_the_log_says_so(encoder, reason, caplog):
    with caplog.at_level(logging.INFO, logger="scripts"):
        network = network_of(encoder, train_image_encoder=encoder != "compact")
    assert any("LoRA is off" in message and reason in message for message in caplog.messages)
    assert not any("parametrizations" in name for name in network.state_dict())
    assert network.settings["lora_rank"] == 0
    wholly = all(parameter.requires_grad for parameter in network.image_encoder.parameters())
    assert wholly == (encoder != "compact")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_that_learns_wholly_does(encoder, generator):
    network = network_of(encoder, train_image_encoder=True).train()
    network(images_for(network, generator)).square().mean().backward()
    for name, parameter in network.image_encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert network.image_encoder.training


def test_batch_statistics_of_a_frozen_encoder_stay(generator):
    network = network_of("lite_medsam").train()
    assert not network.image_encoder.training
    assert not network.prompt_encoder.training
    assert network.decoder.training
    before = {name: value.clone() for name, value in network.image_encoder.named_buffers()}
    network(images_for(network, generator))
    assert all(torch.equal(value, before[name]) for name, value in network.image_encoder.named_buffers())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(encoder, generator):
    gradients, kept = [], []
    for checkpointing in (False, True):
        settings = {"train_image_encoder": encoder == "compact", "prompt_source": "token_output"}
        network = network_of(encoder, gradient_checkpointing=checkpointing, **settings).train()
        images = torch.rand((2, 3, network.image_size, network.image_size), generator=generator.manual_seed(1))
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            levels = network.encode_levels(images)
        kept.append(sum(sizes))
        sum(level.features.square().mean() for level in levels).backward()
        gradients.append({name: parameter.grad for name, parameter in learning(network).items()})
    assert kept[1] < 0.7 * kept[0]
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert (found is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_without_training_nothing_is_computed_twice(generator):
    network = network_of(gradient_checkpointing=True)
    calls: list[nn.Module] = []
    network.image_encoder.blocks[2].register_forward_hook(lambda module, inputs, output: calls.append(module))
    network.class_logits(images_for(network, generator)).mean().backward()
    assert len(calls) == 1


def test_merging_keeps_the_masks_and_leaves_copies_as_they_are(generator):
    for encoder in ("tiny_sam_vit", "lite_medsam"):
        network = network_of(encoder)
        images = images_for(network, generator)
        with torch.no_grad():
            before = network(images)
            twin = copy.deepcopy(network)
            merged = network.merge_lora()
            assert merged is network
            assert (network(images) - before).abs().max() <= 1e-5 * before.abs().max()
            assert torch.equal(twin(images), before)
        rebuilt = HSPSAM(**network.settings).eval()
        rebuilt.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(rebuilt(images), network(images))


@pytest.mark.parametrize("encoder", ["tiny_sam_vit", "lite_medsam"])
def test_a_merged_network_loads_what_was_saved_unmerged(encoder, generator, tmp_path):
    """And gives the masks of the file loaded last, however often it was merged between."""
    first, second = network_of(encoder, seed=1), network_of(encoder, seed=2)
    images = images_for(first, generator)
    network = network_of(encoder)
    for source in (first, second, first):
        path = tmp_path / "model.pt"
        save_state_dict(source.state_dict(), path)
        load_weights(network, path)
        assert network.settings == source.settings
        assert learning(network).keys() == learning(source).keys()
        with torch.no_grad():
            expected = source(images, known_only=True)
            assert torch.equal(network(images, known_only=True), expected)
            assert_close(network.merge_lora().merge_lora()(images, known_only=True), expected, tolerance=1e-5)
    assert network.settings["lora_rank"] == 0


def test_a_copy_of_a_merged_network_loads_what_was_saved_unmerged(generator):
    """As MONAI Label does: a copy is made, and a file loaded into it without comparing names."""
    source, merged = network_of(seed=1), network_of().merge_lora()
    images = images_for(source, generator)
    with torch.no_grad():
        before = merged(images)
        copied = copy.deepcopy(merged)
        found = copied.load_state_dict(source.state_dict(), strict=False)
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
        assert torch.equal(copied(images), source(images))
        assert torch.equal(merged(images), before)
    assert merged.settings["lora_rank"] == 0


def test_a_merged_network_still_loads_what_was_saved_merged(generator, tmp_path):
    source, network = network_of(seed=1).merge_lora(), network_of().merge_lora()
    save_state_dict(source.state_dict(), tmp_path / "model.pt")
    load_weights(network, tmp_path / "model.pt")
    images = images_for(source, generator)
    with torch.no_grad():
        assert torch.equal(network(images), source(images))
    assert not any("parametrizations" in name for name in network.state_dict())


def test_separating_keeps_the_masks_the_type_and_the_random_numbers(generator):
    network = network_of()
    learned = list(learning(network))
    images = images_for(network, generator)
    with torch.no_grad():
        merged = network.merge_lora()(images)
        state = torch.get_rng_state()
        assert torch.equal(network.separate_lora()(images), merged)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(learning(network)) == learned
    half = network.merge_lora().half().separate_lora()
    assert {value.dtype for value in half.state_dict().values()} == {torch.float16}
    plain = network_of(lora_rank=0)
    assert plain.separate_lora().settings["lora_rank"] == 0


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"prompts": 3}, {"fusion": "none"}])
def test_a_refused_file_leaves_a_merged_network_as_it_was(settings, generator, tmp_path):
    network = network_of().merge_lora()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    save_state_dict(network_of(**settings).state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(network, tmp_path / "model.pt")
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert network.settings["lora_rank"] == 0


def test_updates_are_refused_where_none_were_asked_for(tmp_path):
    save_state_dict(network_of().state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(network_of(lora_rank=0).merge_lora(), tmp_path / "model.pt")


# Weights in and out.


@pytest.mark.parametrize(("source", "suffix"), [("static", ".pt"), ("static", ".safetensors"), ("positional", ".pt")])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_reloaded_network_gives_the_same_masks_bit_for_bit(encoder, source, suffix, generator, tmp_path):
    network = network_of(encoder, class_ids=(1, 3), prompt_source=source)
    path = tmp_path / f"model{suffix}"
    save_state_dict(network.state_dict(), path)
    torch.manual_seed(7)
    reloaded = HSPSAM(**network.settings).eval()
    images = images_for(network, generator)
    with torch.no_grad():
        expected = network(images)
        assert not torch.equal(reloaded(images), expected)
        load_weights(reloaded, path)
        assert torch.equal(reloaded(images), expected)
    for level, prompts in network.abstract_prompts.items():
        assert torch.equal(reloaded.abstract_prompts[level], prompts)
        assert prompts.abs().min() > 0


FOUR_PROMPTS = {"prompts": 4}
TWO_POINTS = {"prompt_source": "positional"}


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (FOUR_PROMPTS, {}, "of 4 abstract prompts a level.*of 2 abstract prompts a level"),
        ({}, {"prompts": 0}, "of 2 abstract prompts a level.*of no prompts.*abstract_prompts"),
        ({"prompts": 0}, {}, "of no prompts.*of 2 abstract prompts a level.*missing in the file: abstract_prompts"),
        ({}, TWO_POINTS, "of 2 abstract prompts a level.*of a box and 2 points a level.*position_heads"),
        (TWO_POINTS, {}, "of a box and 2 points a level.*of 2 abstract prompts a level.*position_heads"),
        (TWO_POINTS, {**TWO_POINTS, "prompts": 5}, "of a box and 2 points a level.*of a box and 5 points a level"),
    ],
)
def test_weights_of_other_prompts_are_refused(saved, wanted, message, tmp_path):
    path = tmp_path / "model.pt"
    save_state_dict(network_of(**saved).state_dict(), path)
    network = network_of(**wanted)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(CheckpointError, match=f"model.pt looks like a prompt-free network {message}"):
        load_weights(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_of_another_number_of_prompts_are_named_with_their_shapes(tmp_path):
    path = tmp_path / "model.pt"
    save_state_dict(network_of(prompts=4).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"abstract_prompts.0 \(4, 32\) in the file, \(2, 32\) in the network"):
        load_weights(network_of(prompts=2), path)


def test_weights_of_the_other_network_are_refused(tmp_path):
    prompted = AutoMedSAM(image_encoder="compact", image_size=SIZE, channels=(4, 8, 16), class_ids=(1,))
    prompt_free = network_of("compact")
    save_state_dict(prompted.state_dict(), tmp_path / "prompted.pt")
    save_state_dict(prompt_free.state_dict(), tmp_path / "prompt_free.pt")
    with pytest.raises(CheckpointError, match=r"a class-prompted network .* a prompt-free network of 2 abs"):
        load_weights(prompt_free, tmp_path / "prompted.pt")
    with pytest.raises(CheckpointError, match=r"a prompt-free network of 2 .* a class-prompted network"):
        load_weights(prompted, tmp_path / "prompt_free.pt")


def published_file(tmp_path, encoder: nn.Module, size: int):
    """A file like SAM's of a ViT made for images of that size, and its tensors."""
    parts = {
        "image_encoder": encoder,
        "prompt_encoder": build_prompt_encoder(grid_size=size // 16, image_size=size),
        "mask_decoder": build_mask_decoder(),
    }
    state = nn.ModuleDict(parts).state_dict()
    path = tmp_path / "sam.pth"
    torch.save(state, path)
    return path, state


def test_a_file_for_larger_images_is_loaded_with_its_tables_resized(generator, tmp_path):
    large = SamVit(TINY, image_size=2 * TINY_SIZE)
    for name, parameter in large.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, generator=generator)
    path, state = published_file(tmp_path, large, 2 * TINY_SIZE)
    network = network_of()
    untouched = {name: value.clone() for name, value in network.state_dict().items() if "weight.0." in name}
    load_weights(network, path)
    found = published_state(network.image_encoder)
    assert torch.equal(found["pos_embed"], resize_positions(state["image_encoder.pos_embed"], 4))
    table = "blocks.3.attn.rel_pos_h"
    assert torch.equal(found[table], resize_relative_positions(state[f"image_encoder.{table}"], 4))
    for name in ("blocks.2.attn.rel_pos_h", "blocks.0.attn.qkv.weight", "neck.0.weight", "patch_embed.proj.bias"):
        assert torch.equal(found[name], state[f"image_encoder.{name}"]), name
    assert torch.equal(network.prompt_encoder.no_mask_embed.weight, state["prompt_encoder.no_mask_embed.weight"])
    assert all(torch.equal(network.state_dict()[name], value) for name, value in untouched.items())
    assert untouched
    with torch.no_grad():
        assert network(images_for(network, generator)).isfinite().all()


@pytest.mark.parametrize("encoder", ["lite_medsam", "compact"])
def test_the_parts_of_sam_share_their_memory_with_the_network(encoder, generator):
    network = network_of(encoder)
    parts = network.sam_parts()
    own = published_state(network.image_encoder)
    assert parts["image_encoder"].state_dict().keys() == own.keys() == build_tiny(encoder).state_dict().keys()
    for name, value in parts["image_encoder"].state_dict().items():
        assert value.data_ptr() == own[name].data_ptr()


def test_a_file_of_another_vit_is_refused(tmp_path):
    other = VitSize(channels=48, blocks=5, heads=2, global_blocks=(0, 1, 3, 4))
    path, _ = published_file(tmp_path, SamVit(other, image_size=TINY_SIZE), TINY_SIZE)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_weights(network_of(), path)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": -1}, "0 to 16, not -1"),
        ({"image_encoder": "compact_detailed"}, "the details of compact_detailed are for AutoMedSAM's mask decoder"),
        ({"prompts": 17}, "0 to 16, not 17"),
        ({"class_ids": ()}, "distinct numbers from 1 up"),
        ({"class_ids": (0, 1)}, "distinct numbers from 1 up"),
        ({"class_ids": (2, 2)}, "distinct numbers from 1 up"),
        ({"lora_rank": -1}, "32 channels.*not -1"),
        ({"lora_rank": 33}, "32 channels.*not 33"),
        ({"prompt_source": "box"}, "static, token_output, positional, not 'box'"),
        ({"fusion": "sum"}, "feature_skip, mask_prompt, none, not 'sum'"),
        ({"pixel_normalisation": "imagenet"}, "unit, sam, not 'imagenet'"),
        ({"fusion": "none", "deep_residual": True}, "deep_residual"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        network_of(**settings)


def test_checkpointing_batch_statistics_is_refused():
    with pytest.raises(ConfigError, match="batch statistics"):
        network_of("lite_medsam", train_image_encoder=True, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 64, 64), "alpha channel"),
        ((1, 1, 64, 64), "repeat the channel of grey"),
        ((3, 64, 64), r"colour images \(B, 3, 64, 64\)"),
        ((1, 3, 32, 32), "64 x 64 pixels.*resize"),
        ((1, 3, 64, 48), "64 x 64 pixels.*resize"),
    ],
)
def test_other_images_are_refused(shape, message):
    with pytest.raises(InputError, match=message):
        network_of()(torch.zeros(shape))


def test_integer_pixels_are_refused():
    with pytest.raises(InputError, match="divide 8-bit pixels by 255"):
        network_of()(torch.zeros((1, 3, 64, 64), dtype=torch.uint8))


# Learning.


def shapes(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of a bright disc and a dark bar, and their labels 1 and 2, `(count, 32, 32)`."""
    places = torch.arange(SIZE)
    labels = torch.zeros((count, SIZE, SIZE), dtype=torch.int64)
    for label in labels:
        row, column, radius, left = (
            int(torch.randint(low, high, (1,), generator=generator))
            for low, high in ((8, 24), (8, 16), (4, 7), (22, 26))
        )
        label[((places[:, None] - row) ** 2 + (places[None] - column) ** 2) <= radius**2] = 1
        label[4:28, left : left + 4] = 2
    brightness = torch.tensor([0.4, 0.8, 0.1])[labels]
    noise = 0.05 * torch.randn((count, 3, SIZE, SIZE), generator=generator)
    return (brightness[:, None] + noise).clamp(0, 1), labels


def recipe_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """0.2 cross-entropy + 0.8 soft Dice loss over the batch, as in the authors' recipe but for the background."""
    wanted = F.one_hot(labels, logits.shape[1]).movedim(3, 1)
    found = logits.softmax(dim=1)
    overlap = (found * wanted).sum(dim=(0, 2, 3))
    dice = 2 * overlap / (found.square().sum(dim=(0, 2, 3)) + wanted.sum(dim=(0, 2, 3)))
    return 0.2 * F.cross_entropy(logits, labels) + 0.8 * (1 - dice[1:].mean())


@pytest.mark.parametrize("source", ["static", pytest.param("positional", marks=pytest.mark.slow)])
def test_it_learns_a_few_images_by_heart(source, generator):
    settings = {"class_ids": (1, 2), "train_image_encoder": True, "prompt_source": source}
    network = network_of("compact", shaken=False, **settings).train()
    images, labels = shapes(generator, 4)
    optimiser = torch.optim.AdamW(learning(network).values(), lr=5e-4, fused=True)
    for _ in range(35):
        optimiser.zero_grad()
        recipe_loss(network(images), labels).backward()
        optimiser.step()
    with torch.no_grad():
        found = network.eval()(images).argmax(dim=1)
    for class_id in (1, 2):
        overlap = ((found == class_id) & (labels == class_id)).sum()
        dice = 2 * overlap / ((found == class_id).sum() + (labels == class_id).sum())
        assert dice > 0.9
