"""The store of embeddings: whole or not there, told apart by content, checked when read."""

import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from scripts.data import embeddings
from scripts.data.embeddings import EmbeddingShape, EmbeddingStore, SliceEmbeddings, encoder_key, slices_key
from scripts.errors import OutputError, StoreError

SHAPE = EmbeddingShape(channels=4, rows=3, columns=3)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with two slices a shard."""
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 2 * SHAPE.slice_bytes)
    return EmbeddingStore(tmp_path, encoder="e", shape=SHAPE)


def values(count, seed=0):
    return torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


class Slices:
    """Training slices whose pixels are their numbers."""

    def __init__(self, count=5, versions=1):
        self.places = [(0, place) for place in range(count)]
        self.versions = versions

    def image(self, index, version):
        return torch.full((3, 6, 6), float(10 * version + index))


def encode(pixels):
    """An encoder of which the answer is known: each cell is the pixel's number."""
    return pixels[:, :1, :3, :3].expand(-1, 4, -1, -1) / 7


def wanted(index, version=0):
    return torch.full((4, 3, 3), (10 * version + index) / 7).half()


# ------------------------------------------------------------------------------------------------------------- shards


def test_what_was_written_is_read_in_half_precision(store):
    stored = values(2)
    store.write("a", stored)
    for place in range(2):
        assert torch.equal(store.read("a", place), stored[place].half())


def test_a_slice_of_a_sam_embedding_takes_two_mebibytes():
    shape = EmbeddingShape(channels=256, rows=64, columns=64)
    assert shape.slice_bytes == 2 * 2**20
    assert shape.slices_a_shard == 32


def test_slices_are_divided_into_shards(store):
    assert list(store.shards(5)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_shard_is_there_only_when_it_is_whole(store):
    assert not store.holds("a", count=2)
    store.write("a", values(2))
    assert store.holds("a", count=2)
    assert not store.holds("a", count=3)
    whole = store.path("a").read_bytes()
    for length in (0, 1, 8, 60, len(whole) // 2, len(whole) - 1):
        store.path("a").write_bytes(whole[:length])
        assert not store.holds("a", count=2), length
        with pytest.raises(StoreError, match=r"a\.safetensors"):
            store.read("a", 0)


@pytest.mark.parametrize("place", [0, 1])
def test_a_flipped_bit_is_noticed_and_named(store, place):
    store.write("a", values(2))
    content = load_file(store.path("a"))
    content["embeddings"].view(torch.int16)[place, 2, 1, 1] ^= 1
    save_file(content, store.path("a"))
    with pytest.raises(StoreError, match=rf"a\.safetensors: expected what was written for slice {place}"):
        store.read("a", place)
    assert store.read("a", 1 - place) is not None


def test_numbers_that_half_precision_cannot_hold_are_refused(store):
    too_large = values(1)
    too_large[0, 0, 0, 0] = 70000.0
    with pytest.raises(StoreError, match="half precision"):
        store.write("a", too_large)
    assert not store.path("a").exists()


def test_a_shard_written_anew_is_read_anew(store):
    store.write("a", values(2, seed=1))
    store.read("a", 0)
    store.write("a", values(2, seed=2))
    assert torch.equal(store.read("a", 0), values(2, seed=2)[0].half())


def test_too_little_room_is_told_before_anything_is_computed(store, monkeypatch):
    monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda _: _Usage(free=1000))
    assert store.require_space(10) == 10 * 72
    with pytest.raises(OutputError, match=r"GiB of free space .* for the embeddings of 14 slices"):
        store.require_space(14)  # 14 * 72 bytes and a reserve


class _Usage:
    def __init__(self, free):
        self.free = free


# --------------------------------------------------------------------------------------------------------------- keys


def test_slices_are_told_apart_by_pixels_shape_and_type():
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 1, 3, 4)
    changed = pixels.clone()
    changed[1, 0, 2, 3] += 1
    keys = {slices_key(each) for each in (pixels, changed, pixels.reshape(2, 1, 4, 3), pixels.to(torch.int8))}
    assert len(keys) == 4
    assert slices_key(pixels) == slices_key(pixels.transpose(2, 3).contiguous().transpose(2, 3))


def test_encoders_are_told_apart_by_weights_size_and_normalisation():
    state = {"a": torch.zeros(2), "b": torch.ones((), dtype=torch.int64)}
    other = {**state, "a": torch.tensor([0.0, 1e-45])}
    keys = {
        encoder_key(state, image_size=96, pixel_normalisation="unit"),
        encoder_key(other, image_size=96, pixel_normalisation="unit"),
        encoder_key({"a": state["a"], "c": state["b"]}, image_size=96, pixel_normalisation="unit"),
        encoder_key(state, image_size=128, pixel_normalisation="unit"),
        encoder_key(state, image_size=96, pixel_normalisation="sam"),
    }
    assert len(keys) == 5
    again = {name: state[name].clone() for name in reversed(state)}
    assert encoder_key(again, image_size=96, pixel_normalisation="unit") in keys


# --------------------------------------------------------------------------------------------------------------- pass


def test_a_pass_encodes_every_slice_once_in_every_version(store):
    stored = SliceEmbeddings(store, Slices(versions=2), encode=encode, batch_size=2)
    report = stored.fill(progress=False)
    assert (report.slices, report.encoded) == (10, 10)
    for version in range(2):
        for index in range(5):
            assert torch.equal(stored.read(index, version), wanted(index, version))
    assert SliceEmbeddings(store, Slices(versions=2), encode=_never).fill(progress=False).encoded == 0


def _never(_):
    raise AssertionError("it was there")


def test_two_processes_share_a_pass(store):
    parts = [SliceEmbeddings(store, Slices(), encode=encode) for _ in range(2)]
    for part in parts:
        for block in range(len(part.blocks)):
            part._known(0, block)
    assert [each.fill(part=number, parts=2, progress=False).encoded for number, each in enumerate(parts)] == [3, 0]
    assert parts[0].fill(progress=False).encoded == 2  # what the other would have done, had it started at the same time
    assert all(torch.equal(parts[1].read(index, 0), wanted(index)) for index in range(5))


def test_a_damaged_shard_is_named_and_made_anew(store, caplog):
    stored = SliceEmbeddings(store, Slices(), encode=encode)
    stored.fill(progress=False)
    path = store.path(stored.keys[0, 1])
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING, "scripts"):
        assert torch.equal(stored.read(2, 0), wanted(2))
    assert path.name in caplog.text
    assert store.holds(stored.keys[0, 1], count=2)


def test_what_an_interruption_left_is_cleared_away(store):
    left = store.folder / ".partial-0123.safetensors"
    fresh = store.folder / ".partial-4567.safetensors"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    SliceEmbeddings(store, Slices(), encode=encode).fill(progress=False)
    assert not left.exists()
    assert fresh.exists()  # another process may be writing it


def test_twenty_kills_lose_nothing(store):
    """Killed at any moment, a pass leaves whole shards and nothing else that could be taken for one."""
    moments = np.random.default_rng(7)
    slices = Slices(count=60)
    done = [0]
    longest = 0.06  # seconds
    for _ in range(20):
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # the one shared by fork would stay locked, were it held when killed
            SliceEmbeddings(store, slices, encode=_slowly).fill(progress=False)
            os._exit(0)
        time.sleep(moments.uniform(0.0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        survivor = SliceEmbeddings(store, slices, encode=encode)
        known = [survivor._known(0, block) for block in range(len(survivor.blocks))]
        done.append(sum(known))
        if not done[-1]:
            longest *= 1.5  # a busy machine takes longer to begin
        for block, holds in enumerate(known):
            if holds:
                assert torch.equal(survivor.read(2 * block, 0), wanted(2 * block))
    assert done == sorted(done)  # no kill ever took anything away
    assert done[-1] > 0
    survivor.fill(progress=False)
    assert all(torch.equal(survivor.read(index, 0), wanted(index)) for index in range(60))


def _slowly(pixels):
    time.sleep(0.002)
    return encode(pixels)
