"""Weights files in the published layouts, and everything that can be wrong with one."""

import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from monai.data import MetaTensor
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import nn

from scripts.errors import CheckpointError, ConfigError, OutputError
from scripts.networks.automedsam import AutoMedSAM
from scripts.networks.checkpoints import (
    describe_weights,
    load_class_prompt_encoder,
    load_network_weights,
    load_sam_weights,
    load_weights,
    read_state_dict,
    resize_positions,
    resize_relative_positions,
    sam_names,
    save_state_dict,
)
from scripts.networks.image_encoders import IMAGE_ENCODERS
from scripts.networks.image_encoders.sam_vit import SamVit, VitSize
from scripts.networks.image_encoders.tiny_vit import lite_medsam_encoder, mobile_sam_encoder

TINY_VIT = VitSize(channels=32, blocks=3, heads=2, global_blocks=(1,))


class Parts(nn.Module):
    """The parts that SAM's files fill, and one that they do not."""

    def __init__(self, image_encoder: nn.Module) -> None:
        super().__init__()
        grid, side = image_encoder.grid_size, image_encoder.image_size
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        self.image_encoder = image_encoder
        self.prompt_encoder = PromptEncoder(256, (grid, grid), (side, side), 16)
        self.mask_decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
        self.class_prompt_encoder = ClassPrompts()


class ClassPrompts(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.unet = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 3, 1))
        self.fc_label = nn.Linear(1, 16)


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Give every floating entry, buffers included, a random value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.5, generator=generator)
    return module


def tiny_sam(seed: int, image_size: int = 64) -> Parts:
    network = Parts(SamVit(TINY_VIT, image_size=image_size))
    fill(network, seed)
    return network


def published(network: nn.Module) -> dict[str, torch.Tensor]:
    """A file's content: no class prompt encoder in it, and no memory shared with the network."""
    state = network.state_dict()
    return {name: value.clone() for name, value in state.items() if not name.startswith("class_prompt_encoder.")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def state(generator) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.randn(40, 30, generator=generator), "layer.bias": torch.arange(40.0)}


# Reading


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.PTH"])
def test_torch_files_are_read(tmp_path, state, name):
    torch.save(state, tmp_path / name)
    assert same(read_state_dict(tmp_path / name), state)
    assert same(read_state_dict(str(tmp_path / name)), state)


def test_the_layout_of_before_torch_1_6_is_read(tmp_path, state):
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "w.pth"), state)


def test_safetensors_files_are_read(tmp_path, state):
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    found = read_state_dict(tmp_path / "w.safetensors")
    assert same({name: found[name] for name in state}, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3, "loss": 0.5, "best_loss": 0.4},
        lambda state: {"state_dict": state},
        lambda state: {"network": state, "epoch": 1},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {**state, "epoch": 3},
    ],
    ids=["model", "state_dict", "network", "nested", "parallel", "both", "counter"],
)
def test_training_checkpoints_are_unwrapped(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    assert same(read_state_dict(tmp_path / "w.pth"), state)


def test_a_submodule_called_module_keeps_its_name(tmp_path, state):
    state = {"module.weight": state["layer.weight"], "other.bias": state["layer.bias"]}
    torch.save(state, tmp_path / "w.pth")
    assert same(read_state_dict(tmp_path / "w.pth"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_saved_from_a_gpu_are_read_on_the_cpu(tmp_path, state, monkeypatch, zipped):
    path = tmp_path / "medsam_vit_b.pth"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    found = read_state_dict(path)
    assert same(found, state)
    assert {value.device.type for value in found.values()} == {"cpu"}


# Refusing


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights file .*absent\.pth.*configs/weights\.yaml"):
        read_state_dict(tmp_path / "absent.pth")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder: give the weights file in it"):
        read_state_dict(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path, state, monkeypatch):
    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read everything
    with pytest.raises(CheckpointError, match="permissions"):
        read_state_dict(tmp_path / "w.pth")


def test_another_kind_of_file_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"w\.onnx should end in one of \.pt, \.pth, .*\.safetensors"):
        read_state_dict(tmp_path / "w.onnx")


def torch_bytes(state: dict, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("layout", ["w.pt", "w.pth", "w.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, state, layout, kept):
    content = {
        "w.pt": lambda: torch_bytes(state),
        "w.pth": lambda: torch_bytes(state, _use_new_zipfile_serialization=False),
        "w.safetensors": lambda: safetensors.torch.save(state),
    }[layout]()
    (tmp_path / layout).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"{layout} is not a whole .* again"):
        read_state_dict(tmp_path / layout)


def test_a_changed_byte_among_the_weights_is_noticed(tmp_path, state):
    content = bytearray(torch_bytes(state))
    place = content.index(state["layer.weight"].numpy().tobytes())
    content[place + 100] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    assert torch.load(tmp_path / "w.pt")["layer.weight"].shape == (40, 30)  # PyTorch itself does not notice
    with pytest.raises(CheckpointError, match=r"wrong checksum of .*data/0"):
        read_state_dict(tmp_path / "w.pt")


def test_a_file_without_checksums_is_read(tmp_path, state):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_state_dict(tmp_path / "w.pt"), state)


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html><html>Google Drive - virus scan warning</html>", b"\x80\x02garbage", b"PK\x03\x04garbage"],
    ids=["empty", "web page", "pickle", "zip"],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_something_else_under_the_name_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not a whole .* again"):
        read_state_dict(tmp_path / name)


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme.txt", "not weights")
    with pytest.raises(CheckpointError, match="not a whole PyTorch weights file"):
        read_state_dict(tmp_path / "w.pt")


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, state, zipped):
    canary = tmp_path / "ran"
    torch.save({**state, "extra": Canary(canary)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"Python object \(\S*open\).*state_dict\(\).*safetensors") as caught:
        read_state_dict(tmp_path / "w.pt")
    assert not canary.exists()
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to switch the protection off


def test_code_in_a_plain_pickle_is_not_run(tmp_path):
    canary = tmp_path / "ran"
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Canary(canary), protocol=2))
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "w.pt")
    assert not canary.exists()


def test_a_whole_module_is_refused_with_what_to_do(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict\(\)"
    ):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "described"),
    [
        ({}, "an empty dictionary"),
        ({"epoch": 3, "loss": 0.5}, "a dictionary with the entries epoch, loss"),
        ({"model": {}}, "a dictionary with the entries model"),
        ({"state": {0: {"step": torch.tensor(1)}}, "param_groups": []}, "entries state, param_groups"),
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({0: torch.zeros(2)}, "a dictionary with the entries 0"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content, described):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=rf"holds no named tensors: give the file of a state dict, not .*{described}"
    ):
        read_state_dict(tmp_path / "w.pt")


# Hugging Face


def hugging_face_name(name: str) -> str:
    """SAM to SamModel, word by word: written apart from the rules under test, which go the other way."""
    if name == "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix":
        return "shared_image_embedding.positional_embedding"
    words = name.split(".")
    if words[0] == "image_encoder":
        words[0] = "vision_encoder"
        words = ["layers" if word == "blocks" else word for word in words]
        words = ["projection" if words[1] == "patch_embed" and word == "proj" else word for word in words]
        if words[1] == "neck":
            words[2] = ("conv1", "layer_norm1", "conv2", "layer_norm2")[int(words[2])]
    elif words[1] == "point_embeddings":
        words[1] = "point_embed"
    elif words[1] == "mask_downscaling":
        named = {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"}
        words[1:3] = ["mask_embed", named[words[2]]]
    elif words[1] == "output_upscaling":
        words[1:3] = [{"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"}[words[2]]]
    elif words[1] in ("iou_prediction_head", "output_hypernetworks_mlps"):
        place = words.index("layers")
        words[place : place + 2] = [["proj_in"], ["layers", "0"], ["proj_out"]][int(words[place + 1])]
    return ".".join("layer_" + word if re.fullmatch(r"norm(\d|_final_attn)", word) else word for word in words)


def hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {hugging_face_name(name): value for name, value in state.items()}
    tied = renamed["shared_image_embedding.positional_embedding"]
    return {**renamed, "prompt_encoder.shared_embedding.positional_embedding": tied}


@pytest.mark.parametrize("variant", ["b", "l", "h"])
def test_hugging_face_names_map_one_to_one(variant):
    with torch.device("meta"):
        state = sam_model_registry[f"vit_{variant}"]().state_dict()
    theirs = hugging_face(state)
    back = sam_names(theirs)
    assert len(theirs) == len(state) + 1
    assert list(back) == list(state)
    assert all(back[name] is state[name] for name in state)
    if variant == "b":
        assert (len(theirs), len(back)) == (315, 314)
        assert sum(value.numel() for value in back.values()) == 93_735_472 + 2 * 128  # parameters and the matrix


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vision_encoder.pos_embed", "image_encoder.pos_embed"),
        ("vision_encoder.layers.11.attn.rel_pos_h", "image_encoder.blocks.11.attn.rel_pos_h"),
        ("vision_encoder.layers.0.layer_norm2.bias", "image_encoder.blocks.0.norm2.bias"),
        ("vision_encoder.neck.layer_norm1.weight", "image_encoder.neck.1.weight"),
        ("prompt_encoder.mask_embed.layer_norm2.weight", "prompt_encoder.mask_downscaling.4.weight"),
        ("mask_decoder.transformer.layers.1.layer_norm4.bias", "mask_decoder.transformer.layers.1.norm4.bias"),
        ("mask_decoder.transformer.layer_norm_final_attn.bias", "mask_decoder.transformer.norm_final_attn.bias"),
        ("mask_decoder.iou_prediction_head.layers.0.bias", "mask_decoder.iou_prediction_head.layers.1.bias"),
        (
            "mask_decoder.output_hypernetworks_mlps.3.proj_in.weight",
            "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight",
        ),
    ],
)
def test_single_names_of_hugging_face(theirs, ours):
    assert list(sam_names({theirs: torch.zeros(1)})) == [ours]


@pytest.mark.parametrize("dropped", ["shared_image_embedding", "prompt_encoder.shared_embedding", None])
def test_a_hugging_face_file_loads(tmp_path, dropped):
    """Files of safetensors hold only one of the two names of the position matrix."""
    source, network = tiny_sam(1), tiny_sam(2)
    state = {
        name: value for name, value in hugging_face(published(source)).items() if not name.startswith(str(dropped))
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    load_sam_weights(network, tmp_path / "pytorch_model.bin")
    assert same(published(network), published(source))


# Published files


@pytest.mark.parametrize(
    ("build", "entries"), [(lite_medsam_encoder, 435), (mobile_sam_encoder, 439)], ids=["lite_medsam", "mobile_sam"]
)
def test_tiny_vit_files_load_strictly(tmp_path, build, entries):
    source = fill(Parts(build(image_size=64)), 1)
    assert len(published(source)) == entries
    torch.save(published(source), tmp_path / "w.pth")
    network = fill(Parts(build(image_size=64)), 2)
    untouched = {name: value.clone() for name, value in network.class_prompt_encoder.state_dict().items()}
    load_sam_weights(network, tmp_path / "w.pth")
    assert same(published(network), published(source))
    assert same(network.class_prompt_encoder.state_dict(), untouched)


def test_the_published_lite_medsam_names_are_the_ones_expected(shared):
    names = json.loads((shared / "golden" / "lite_medsam_encoder.json").read_text())["shapes"]
    with torch.device("meta"):
        network = Parts(lite_medsam_encoder())
    encoder = [name for name in published(network) if name.startswith("image_encoder.")]
    assert encoder == [f"image_encoder.{name}" for name in names]
    assert sum(value.numel() for value in network.image_encoder.parameters()) == 5_726_740


def test_eval_before_loading_is_no_trap(tmp_path, generator):
    image = torch.rand(1, 3, 32, 32, generator=generator)
    source = fill(Parts(lite_medsam_encoder(image_size=32)), 1).eval()
    torch.save(published(source), tmp_path / "w.pth")
    network = fill(Parts(lite_medsam_encoder(image_size=32)), 2).eval()
    with torch.no_grad():
        network.image_encoder(image)
        load_sam_weights(network, tmp_path / "w.pth")
        assert torch.equal(network.image_encoder(image), source.image_encoder(image))


def test_half_precision_files_load_into_single(tmp_path):
    source, network = tiny_sam(1), tiny_sam(2)
    torch.save({name: value.half() for name, value in published(source).items()}, tmp_path / "w.pth")
    load_sam_weights(network, tmp_path / "w.pth")
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    torch.testing.assert_close(published(network), published(source), rtol=1e-3, atol=0)


def test_tables_of_positions_shrink_to_the_network(tmp_path):
    source, network = tiny_sam(1, image_size=256), tiny_sam(2, image_size=64)
    torch.save(published(source), tmp_path / "w.pth")
    load_sam_weights(network, tmp_path / "w.pth")
    expected = published(source)
    # segment_anything resizes relative positions itself when they do not fit; rows [i, j] depend on i - j alone
    for axis in ("h", "w"):
        name = f"image_encoder.blocks.1.attn.rel_pos_{axis}"
        fitted = get_rel_pos(4, 4, expected[name])
        expected[name] = torch.cat((fitted[0].flip(0), fitted[1:, 0]))
    expected["image_encoder.pos_embed"] = resize_positions(expected["image_encoder.pos_embed"], 4)
    assert expected["image_encoder.pos_embed"].shape == (1, 4, 4, 32)
    assert same(published(network), expected)


def test_window_tables_of_the_same_length_stay(tmp_path):
    """At 224 pixels the global tables are as long as the windows' own, which must not be resized."""
    source, network = tiny_sam(1, image_size=224), tiny_sam(2, image_size=64)
    assert source.image_encoder.blocks[0].attn.rel_pos_h.shape == source.image_encoder.blocks[1].attn.rel_pos_h.shape
    torch.save(published(source), tmp_path / "w.pth")
    load_sam_weights(network, tmp_path / "w.pth")
    windowed, whole = network.image_encoder.blocks[0].attn, network.image_encoder.blocks[1].attn
    assert torch.equal(windowed.rel_pos_h, source.image_encoder.blocks[0].attn.rel_pos_h)
    assert whole.rel_pos_h.shape == (7, 16)


def test_a_checkpoint_for_smaller_images_is_refused(tmp_path):
    torch.save(published(tiny_sam(1, image_size=64)), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"for 64 pixels .* for 128 pixels.*3 of another shape: image_encoder.pos_embed"
    ):
        load_sam_weights(tiny_sam(2, image_size=128), tmp_path / "w.pth")


def test_a_ramp_of_positions_stays_a_ramp():
    """Away from the border, cell i of the small grid lies at 4 i + 1.5 of the large one."""
    rows = torch.arange(64.0)[:, None].expand(64, 64)
    table = torch.stack((rows, rows.T), dim=-1)[None]  # (1, 64, 64, 2)
    small = resize_positions(table, 16)
    middle = 4.0 * torch.arange(16.0)[4:12] + 1.5
    torch.testing.assert_close(small[0, 4:12, 8, 0], middle, rtol=0, atol=1e-3)
    torch.testing.assert_close(small[0, 8, 4:12, 1], middle, rtol=0, atol=1e-3)


def test_a_cell_of_the_small_grid_stands_for_all_it_covers():
    """One row in four is 1: its share of each cell is a quarter, wherever the cells' centres fall."""
    rows = (torch.arange(64) % 4 == 0).float()[:, None].expand(64, 64)
    small = resize_positions(rows[None, :, :, None], 16)
    torch.testing.assert_close(small[0, 4:12, :, 0], torch.full((8, 16), 0.25), rtol=0, atol=0.05)


def test_relative_positions_keep_their_centre():
    table = torch.arange(-63.0, 64.0)[:, None].expand(127, 3)  # offsets of a 64 grid
    small = resize_relative_positions(table, 16)
    assert small.shape == (31, 3)
    torch.testing.assert_close(small, -small.flip(0))
    torch.testing.assert_close(small[15], torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(small[16] - small[15], torch.full((3,), 127 / 31), rtol=0, atol=1e-4)


# Files for another network


def test_a_mobile_sam_file_does_not_go_into_lite_medsam(tmp_path):
    torch.save(published(Parts(mobile_sam_encoder(image_size=64))), tmp_path / "mobile_sam.pt")
    network = fill(Parts(lite_medsam_encoder(image_size=64)), 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_sam_weights(network, tmp_path / "mobile_sam.pt")
    text = str(caught.value)
    assert "mobile_sam.pt looks like MobileSAM's TinyViT" in text
    assert "loaded into, which looks like LiteMedSAM's TinyViT" in text
    assert (
        "2 of another shape: image_encoder.patch_embed.seq.0.c.weight (32, 3, 3, 3) in the file, (32, 3, 1, 1) in the "
        "network, image_encoder.patch_embed.seq.2.c.weight"
    ) in text
    assert "4 unknown to the network: image_encoder.norm_head.weight (320,)" in text
    assert "and 1 more" in text
    assert "missing" not in text
    assert "\n" not in text
    assert same(network.state_dict(), before)


def test_missing_and_unknown_entries_are_named(tmp_path):
    state = published(tiny_sam(1))
    state["image_encoder.extra"] = state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load_sam_weights(tiny_sam(2), tmp_path / "w.pth")
    assert "1 missing in the file: mask_decoder.iou_token.weight (1, 256)" in str(caught.value)
    assert "1 unknown to the network: image_encoder.extra (1, 256)" in str(caught.value)


def test_a_network_without_the_parts_is_refused(tmp_path):
    torch.save(published(tiny_sam(1)), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="no image_encoder"):
        load_sam_weights(nn.Linear(2, 2), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"image_encoder.pos_embed": (1, 64, 64, 768)}, "SAM's or MedSAM's ViT-B for 1024 pixels"),
        ({"image_encoder.pos_embed": (1, 64, 64, 1024)}, "SAM's ViT-L for 1024 pixels"),
        ({"image_encoder.pos_embed": (1, 32, 32, 1280)}, "SAM's ViT-H for 512 pixels"),
        ({"image_encoder.patch_embed.seq.0.c.weight": (32, 3, 1, 1)}, "LiteMedSAM's TinyViT"),
        ({"image_encoder.patch_embed.seq.0.c.weight": (32, 3, 3, 3)}, "MobileSAM's TinyViT"),
        ({"image_encoder.stages.0.0.weight": (32, 3, 3, 3)}, "the compact encoder"),
        (
            {"image_encoder.stages.0.0.weight": (32, 3, 3, 3), "image_encoder.details.0.bias": (32,)},
            "the compact encoder with details",
        ),
        ({"image_encoder.conv.weight": (32, 3, 3, 3)}, "an unknown image encoder"),
        ({"fc.weight": (2, 2)}, "no image encoder"),
        ({"unet.enc1.0.weight": (64, 257, 3, 3)}, "a class prompt encoder alone"),
        (
            {"class_prmpt_encoder.fc_label.bias": (16,), "image_encoder.pos_embed": (1, 64, 64, 768)},
            "a class-prompted network with SAM's or MedSAM's ViT-B for 1024 pixels",
        ),
        ({"decoder.mask_tokens.weight": (2, 256)}, "a prompt-free network of no prompts with no image encoder"),
        (
            {
                "abstract_prompts.1": (4, 64),
                "decoder.mask_tokens.weight": (2, 256),
                "image_encoder.stages.0.0.bias": (32,),
            },
            "a prompt-free network of 4 abstract prompts a level with the compact encoder",
        ),
        (
            {"decoder.mask_tokens.weight": (2, 256), "position_heads.3.slopes": (12, 2)},
            "a prompt-free network of a box and 8 points a level with no image encoder",
        ),
    ],
)
def test_architectures_are_recognised(entries, words):
    assert describe_weights({name: torch.zeros(shape, device="meta") for name, shape in entries.items()}) == words


def test_the_compact_encoder_is_recognised_by_its_own_names():
    state = IMAGE_ENCODERS["compact"]().state_dict()
    assert describe_weights({f"image_encoder.{name}": value for name, value in state.items()}) == "the compact encoder"


# Our own files and the authors'


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_network_survives_its_file(tmp_path, name):
    source, network = tiny_sam(1), tiny_sam(2)
    save_state_dict(source.state_dict(), tmp_path / name)
    load_network_weights(network, tmp_path / name)
    assert same(network.state_dict(), source.state_dict())


def test_a_part_is_not_a_network(tmp_path):
    network = tiny_sam(2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(published(tiny_sam(1)), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"6 missing in the file: class_prompt_encoder\.unet\.0\.weight \(4, 3, 3, 3\)"
    ):
        load_network_weights(network, tmp_path / "w.pt")
    assert same(network.state_dict(), before)


@pytest.mark.parametrize("prefix", ["class_prmpt_encoder.", "diffusion_model.", "class_prompt_encoder."])
def test_an_authors_class_prompt_encoder_is_taken_out(tmp_path, prefix):
    source = fill(ClassPrompts(), 1)
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": {**state, "mask_decoder.iou_token.weight": torch.zeros(1, 256)}}, tmp_path / "w.pth")
    network = tiny_sam(2)
    before = published(network)
    load_class_prompt_encoder(network, tmp_path / "w.pth")
    assert same(network.class_prompt_encoder.state_dict(), source.state_dict())
    assert same(published(network), before)


def test_a_file_without_class_prompt_encoder_is_refused(tmp_path):
    torch.save(published(tiny_sam(1)), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"no class prompt encoder.*class_prmpt_encoder\..*diffusion_model\."):
        load_class_prompt_encoder(tiny_sam(2), tmp_path / "w.pth")


def test_a_class_prompt_encoder_of_another_width_is_refused(tmp_path):
    state = ClassPrompts(width=8).state_dict()
    torch.save({f"diffusion_model.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"3 of another shape: unet\.0\.weight \(8, 3, 3, 3\) in the file, \(4, 3, 3, 3\)"
    ):
        load_class_prompt_encoder(tiny_sam(2), tmp_path / "w.pth")


# Saving


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_what_is_saved_is_plain(tmp_path, name):
    large = torch.arange(1_000_000.0)
    state = {
        "parameter": nn.Parameter(torch.ones(2, 3)),
        "view": large[10:20],
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "meta": MetaTensor(torch.ones(2), meta={"filename_or_obj": "patient.nii.gz"}),
        "scalar": torch.tensor(7),
        "shared": large[10:20],
    }
    save_state_dict(state, tmp_path / name)
    found = read_state_dict(tmp_path / name)
    assert set(found) == set(state)
    for key, value in found.items():
        assert type(value) is torch.Tensor
        assert not value.requires_grad
        assert value.dtype == state[key].dtype
        assert torch.equal(value, torch.as_tensor(state[key].detach()))
    assert (tmp_path / name).stat().st_size < 20_000  # not the million values behind the view
    assert b"patient" not in (tmp_path / name).read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saving_leaves_one_ordinary_file_with_bytes_of_its_own(tmp_path, state, suffix):
    (tmp_path / "ordinary").touch()
    for name in ("first", "second"):
        save_state_dict(state, tmp_path / f"{name}{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["ordinary", f"first{suffix}", f"second{suffix}"])
    assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()
    assert (tmp_path / f"first{suffix}").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failed_save_keeps_the_file_before(tmp_path, state, monkeypatch):
    path = tmp_path / "w.pt"
    save_state_dict(state, path)
    before = path.read_bytes()

    def full_disk(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        save_state_dict({"other": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [("w.onnx", r"\.pt, \.pth or \.safetensors, not as w\.onnx"), ("w", "not as w"), ("absent/w.pt", "absent")],
)
def test_a_place_that_cannot_be_is_refused(tmp_path, state, name, message):
    with pytest.raises(OutputError, match=message):
        save_state_dict(state, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced(tmp_path, state):
    (tmp_path / "w.pt").mkdir()
    with pytest.raises(OutputError, match="not a plain file"):
        save_state_dict(state, tmp_path / "w.pt")


# Where published weights come from


def test_the_table_of_published_weights_is_complete(bundle_root):
    rows = yaml.safe_load((bundle_root / "configs" / "weights.yaml").read_text())
    assert {"sam_vit_b", "sam_vit_l", "sam_vit_h", "medsam_vit_b", "lite_medsam", "mobile_sam"} < set(rows)
    for row in rows.values():
        assert set(row) == {"file", "url", "sha256", "bytes", "licence", "encoder", "pixels", "notes"}
        assert row["url"].startswith("https://")
        assert row["sha256"] is None or re.fullmatch("[0-9a-f]{64}", row["sha256"])
        assert row["bytes"] is None or row["bytes"] > 10**7
        assert row["encoder"] in IMAGE_ENCODERS
        assert row["pixels"] == ("unit" if "medsam" in row["file"] + row["url"] else "sam")
        assert Path(row["file"]).suffix in (".pt", ".pth", ".bin", ".safetensors")


def test_a_file_from_before_the_details_starts_a_network_with_them(tmp_path):
    settings = {"image_size": 32, "class_ids": [1], "channels": [8, 16, 32]}
    plain = AutoMedSAM(image_encoder="compact", **settings)
    detailed = AutoMedSAM(image_encoder="compact_detailed", **settings)
    save_state_dict(plain.state_dict(), tmp_path / "model.pt")
    load_weights(detailed, tmp_path / "model.pt")
    for name, value in plain.state_dict().items():
        assert torch.equal(detailed.state_dict()[name], value), name
    save_state_dict(detailed.state_dict(), tmp_path / "detailed.pt")
    with pytest.raises(CheckpointError, match=r"compact encoder with details and does not fit"):
        load_weights(plain, tmp_path / "detailed.pt")


def test_sam_parts_from_before_the_details_start_a_network_with_them(tmp_path):
    settings = {"image_size": 32, "class_ids": [1], "channels": [8, 16, 32]}
    plain = AutoMedSAM(image_encoder="compact", **settings)
    detailed = AutoMedSAM(image_encoder="compact_detailed", **settings)
    for values in detailed.mask_decoder.details.parameters():
        torch.nn.init.ones_(values)  # what was learned of details does not belong to other weights
    encoder = {name: value.clone() for name, value in detailed.image_encoder.details.state_dict().items()}
    save_state_dict(plain.sam_parts().state_dict(), tmp_path / "parts.pt")
    load_weights(detailed, tmp_path / "parts.pt")
    for name, value in plain.sam_parts().state_dict().items():
        assert torch.equal(detailed.state_dict()[name], value), name
    assert all(torch.equal(detailed.image_encoder.details.state_dict()[name], value) for name, value in encoder.items())
    assert not any(values.any() for values in detailed.mask_decoder.details.parameters())
