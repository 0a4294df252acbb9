"""Image embeddings on disk: what a frozen encoder says of a slice is computed once and read ever after.

A store is a folder for one encoder (its weights, input size and normalisation make its name). In it are shards, files
of a few slices' embeddings in half precision, called after the content of the slices that they were made of. So a
shard can never be of other pixels or other weights than it says, two cases with the same pixels share one, and nothing
has to be deleted when data or weights change.

A shard is written under a temporary name and renamed when it is whole: an interruption at any byte leaves no shard,
two writers leave the same one, and readers keep what they have opened. Each slice has a checksum, looked at whenever
the slice is read.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import get_worker_info
from tqdm import tqdm

from scripts.errors import OutputError, StoreError
from scripts.files import TEMPORARY_PREFIX, atomic_path

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20  # one file; a SAM embedding of 64 x 64 cells takes 2 MiB a slice
SUFFIX = ".safetensors"
_HALF_BYTES = 2
_NAME_LENGTH = 32  # hexadecimal digits: half a SHA-256, out of reach of chance
_STALE_SECONDS = 3600.0
_RESERVE = 1.05  # of the estimate, for what a file system needs besides


@dataclass(frozen=True)
class EmbeddingShape:
    """Shape of one slice's embedding: channels, rows and columns of the grid."""

    channels: int
    rows: int
    columns: int

    @property
    def slice_bytes(self) -> int:
        """Size of one slice's embedding on disk."""
        return self.channels * self.rows * self.columns * _HALF_BYTES

    @property
    def slices_a_shard(self) -> int:
        """How many slices a shard holds, at least one."""
        return max(1, SHARD_BYTES // self.slice_bytes)


def slices_key(slices: torch.Tensor) -> str:
    """Name slices by their content.

    Args:
        slices: `(n, C, S, S)` of any type, as they go into the encoder.
    """
    digest = hashlib.sha256(repr((tuple(slices.shape), str(slices.dtype))).encode())
    digest.update(np.ascontiguousarray(slices.numpy()).data)
    return digest.hexdigest()[:_NAME_LENGTH]


def encoder_key(state: dict[str, torch.Tensor], *, image_size: int, pixel_normalisation: str) -> str:
    """Name an encoder by its weights and by what it does to pixels.

    Args:
        state: its state dict.
        image_size: side of its input in pixels.
        pixel_normalisation: what is done to pixels in [0, 1] before it.
    """
    digest = hashlib.sha256(repr((image_size, pixel_normalisation)).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()[:_NAME_LENGTH]


class EmbeddingStore:
    """The embeddings of one encoder in one folder.

    Args:
        folder: of all stores.
        encoder: from `encoder_key`.
        shape: of one slice's embedding.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], *, encoder: str, shape: EmbeddingShape) -> None:
        self.folder = Path(folder) / encoder
        self.shape = shape
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"expected a folder for embeddings at {self.folder}, got {error.strerror}") from error

    def shards(self, count: int) -> Iterator[slice]:
        """Divide the slices of a case into shards."""
        step = self.shape.slices_a_shard
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def path(self, key: str) -> Path:
        """Say where the shard of a key lies."""
        return self.folder / f"{key}{SUFFIX}"

    def holds(self, key: str, *, count: int) -> bool:
        """Tell whether a shard is there, whole and of the right shape; its values are checked when they are read."""
        try:
            return self._open(key).shape == (count, *self._grid)
        except (FileNotFoundError, StoreError):
            return False

    def write(self, key: str, embeddings: torch.Tensor) -> None:
        """Write a shard.

        Args:
            key: from `slices_key`.
            embeddings: `(n, channels, rows, columns)` of any floating type.

        Raises:
            StoreError: a value that half precision cannot hold.
            OutputError: the file cannot be written.
        """
        halves = embeddings.detach().to("cpu", torch.float16).contiguous()
        if not bool(torch.isfinite(halves).all()):
            raise StoreError(
                "expected embeddings that half precision can hold, got values beyond 65504 or none at all; train "
                "without the store (--embeddings false)"
            )
        sums = torch.tensor([checksum(each) for each in halves], dtype=torch.int64)
        with atomic_path(self.path(key)) as temporary:
            save_file({"embeddings": halves, "checksums": sums}, temporary)

    def read(self, key: str, place: int) -> torch.Tensor:
        """Read one slice's embedding, `(channels, rows, columns)` float16.

        Raises:
            StoreError: the shard is missing or not what was written; the text names it.
        """
        try:
            shard = self._open(key)
            embedding = shard.handle.get_slice("embeddings")[place]
            expected = int(shard.sums[place])
        except (FileNotFoundError, SafetensorError, IndexError) as error:
            raise StoreError(f"{self.path(key)}: expected the embeddings of slice {place}, got {error}") from error
        if checksum(embedding) != expected:
            raise StoreError(f"{self.path(key)}: expected what was written for slice {place}, got another")
        return embedding

    def recall(self, slices: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Give the embeddings of a shard's slices, which are encoded only if the store lacks them.

        A damaged shard is named in the log and made anew.

        Args:
            slices: `(n, 3, S, S)` as they go into the encoder.
            encode: from slices to embeddings, without gradient.

        Returns:
            `(n, channels, rows, columns)` float16, on the CPU.

        Raises:
            OutputError: there is no room on the disk.
            StoreError: a value that half precision cannot hold.
        """
        key, count = slices_key(slices.cpu()), len(slices)
        if self.holds(key, count=count):
            try:
                return self._read_all(key, count)
            except StoreError as error:
                logger.warning("%s; it is made anew", error)
                self.discard(key)
        self.require_space(count)
        self.write(key, encode(slices))
        return self._read_all(key, count)

    def _read_all(self, key: str, count: int) -> torch.Tensor:
        return torch.stack([self.read(key, place) for place in range(count)])

    def discard(self, key: str) -> None:
        """Remove a shard that cannot be trusted, so that it is made anew."""
        self.path(key).unlink(missing_ok=True)
        _open_shard.cache_clear()

    def clear_remains(self) -> None:
        """Remove temporary files of processes that were killed; those of the last hour may still be written to."""
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def require_space(self, slices: int) -> int:
        """Check before anything is computed that the disk has room.

        Args:
            slices: that are to be embedded.

        Returns:
            The bytes they will take.

        Raises:
            OutputError: there is too little room; the text says how much is needed and how much is free.
        """
        needed = slices * self.shape.slice_bytes
        free = shutil.disk_usage(self.folder).free
        if needed * _RESERVE > free:
            raise OutputError(
                f"expected {needed * _RESERVE / 2**30:.1f} GiB of free space in {self.folder} for the embeddings of "
                f"{slices} slices, got {free / 2**30:.1f} GiB; give another --embeddings_dir, or do without the store"
            )
        return needed

    @property
    def _grid(self) -> tuple[int, int, int]:
        return (self.shape.channels, self.shape.rows, self.shape.columns)

    def _open(self, key: str) -> "_Shard":
        path = self.path(key)
        status = path.stat()
        # The file's identity is part of the question, so a shard made anew is never mistaken for the one before.
        return _open_shard(str(path), status.st_ino, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class _Shard:
    """An open, memory-mapped shard."""

    handle: Any
    sums: Sequence[int]
    shape: tuple[int, ...]


@lru_cache(maxsize=256)
def _open_shard(path: str, inode: int, changed: int, size: int) -> _Shard:
    """Open a shard once; the numbers are there to tell two files of one name apart."""
    del inode, changed, size
    try:
        handle = safe_open(path, framework="pt")
        embeddings = handle.get_slice("embeddings")
        return _Shard(handle, handle.get_tensor("checksums").tolist(), tuple(embeddings.get_shape()))
    except (SafetensorError, OSError, KeyError) as error:
        raise StoreError(f"{path}: expected a whole shard of embeddings, got a damaged file ({error})") from error


def checksum(embedding: torch.Tensor) -> int:
    """Sum up the bytes of an embedding so that damage shows."""
    return zlib.crc32(np.ascontiguousarray(embedding.numpy()).data)


# --------------------------------------------------------------------------------------------------- training slices


class VersionedSlices(Protocol):
    """Training slices, each in one or several fixed versions."""

    places: list[tuple[int, int]]
    versions: int

    def image(self, index: int, version: int) -> torch.Tensor:
        """Give the pixels `(3, S, S)` in [0, 1] of a slice in one of its versions."""
        ...


@dataclass(frozen=True)
class FillReport:
    """What a pass over the slices did.

    Attributes:
        slices: in all versions together.
        encoded: of these, how many were not there yet.
        seconds: that the pass took.
    """

    slices: int
    encoded: int
    seconds: float


class SliceEmbeddings:
    """The embeddings of training slices, from the store or, where it lacks them, from the encoder.

    Args:
        store: of the encoder.
        slices: the training slices, whose versions do not change from epoch to epoch.
        encode: from `(n, 3, S, S)` in [0, 1] to `(n, channels, rows, columns)`, without gradient.
        batch_size: n, how many slices go through the encoder together.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        slices: VersionedSlices,
        *,
        encode: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int = 8,
    ) -> None:
        self.store = store
        self.slices = slices
        self.encode = encode
        self.batch_size = batch_size
        step = store.shape.slices_a_shard
        self.blocks = [
            range(start, min(start + step, len(slices.places))) for start in range(0, len(slices.places), step)
        ]
        self.keys: dict[tuple[int, int], str] = {}

    def fill(self, *, part: int = 0, parts: int = 1, progress: bool = True) -> FillReport:
        """Encode what the store lacks; an interrupted pass goes on where it stopped.

        Args:
            part: which share of the missing blocks this process encodes, from 0.
            parts: number of processes.
            progress: whether to show a bar.

        Raises:
            OutputError: too little room on the disk, told before anything is encoded.
        """
        start = time.perf_counter()
        self.store.clear_remains()
        tasks = [(version, number) for version in range(self.slices.versions) for number in range(len(self.blocks))]
        total = sum(len(self.blocks[number]) for _, number in tasks)
        missing = [task for task in tasks if not self._known(*task)]
        needed = self.store.require_space(sum(len(self.blocks[number]) for _, number in missing))
        logger.info(
            "embeddings of %d slices in %s; %d are there, %.2f GiB to be written",
            total, self.store.folder, total - sum(len(self.blocks[number]) for _, number in missing), needed / 2**30,
        )  # fmt: skip
        encoded = 0
        with tqdm(total=total, initial=0, desc="embedding", unit="slice", disable=not progress or not missing) as bar:
            bar.update(total - sum(len(self.blocks[number]) for _, number in missing))
            for place, (version, number) in enumerate(missing):
                if place % parts == part:
                    self._write(version, number)
                    encoded += len(self.blocks[number])
                bar.update(len(self.blocks[number]))
        return FillReport(slices=total, encoded=encoded, seconds=time.perf_counter() - start)

    def read(self, index: int, version: int) -> torch.Tensor:
        """Give the embedding of a slice in one of its versions, `(channels, rows, columns)` float16.

        A damaged shard is named in the log and made anew.

        Raises:
            StoreError: a damaged shard in a worker process, which has no encoder.
        """
        number, place = divmod(index, self.store.shape.slices_a_shard)
        key = self.keys[version, number]
        try:
            return self.store.read(key, place)
        except StoreError as error:
            if get_worker_info() is not None:
                raise StoreError(f"{error}; start again, which makes it anew") from error
            logger.warning("%s; it is made anew", error)
            self.store.discard(key)
            self._write(version, number)
            return self.store.read(key, place)

    def _pixels(self, version: int, number: int) -> torch.Tensor:
        return torch.stack([self.slices.image(index, version) for index in self.blocks[number]])

    def _known(self, version: int, number: int) -> bool:
        """Find out a block's key, and whether the store has it."""
        key = slices_key(self._pixels(version, number))
        self.keys[version, number] = key
        return self.store.holds(key, count=len(self.blocks[number]))

    def _write(self, version: int, number: int) -> None:
        pixels = self._pixels(version, number)
        parts = [self.encode(part).cpu() for part in pixels.split(self.batch_size)]
        self.store.write(self.keys[version, number], torch.cat(parts))
