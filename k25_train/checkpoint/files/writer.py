"""Writing a file of parts: in one pass over the tensors, hashed as they are written, without a copy of them.

Memory: the tensors of the caller and the table of checksums, whatever the size of the file.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
import xxhash
from torch import Tensor
from upath import UPath

from k25_train.checkpoint.files.header import BLOCK_BYTES, digest_of, lay_out
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.manifest import FileEntry

CHUNK_BYTES = 8 * BLOCK_BYTES
"""Bytes that are hashed, and then written while a cache still has them."""
_START_BYTES = 32 * 1024**2
"""After so many bytes a disk is told to start on them: fsync then has little left to wait for (0.03 s instead
of 0.16 s after 400 MB). `POSIX_FADV_DONTNEED` does that on Linux (mm/fadvise.c of 6.18)."""


class _File(Protocol):
    def write(self, data: Any, /) -> Any: ...


class PartsWriter:
    """Writes a file of parts whose tensors come in order, whole or piece by piece.

    Use it with `with`: a file whose writing failed is closed as it is on a local disk, and not uploaded to an
    object store. `entry` is there after the last piece.
    """

    def __init__(self, path: Path | UPath, parts: Sequence[Part]) -> None:
        """Create the file, which may not exist, with its header.

        Raises ValueError for parts that one file cannot have (`lay_out`), OSError.
        """
        self._path = path
        self._header, start = lay_out(parts)
        self._header_xxh3 = digest_of(start)
        self._coming = iter(self._header.entries)
        self._part: Part | None = None
        self._missing_bytes = 0
        self._table = np.empty(self._header.table_bytes // 8, dtype="<u8")
        self._num_blocks = 0
        self._block = xxhash.xxh3_64()
        self._block_bytes = 0
        self._written_bytes = self._started_bytes = 0
        self._entry: FileEntry | None = None
        self._is_local = isinstance(path, Path)
        self._file: Any = path.open("xb", buffering=0) if isinstance(path, Path) else path.open("wb")
        _write_all(self._file, memoryview(start))
        self._written_bytes = len(start)
        self._next_part()

    @property
    def entry(self) -> FileEntry:
        """The file as the manifest lists it. Raises RuntimeError before all is written."""
        if self._entry is None:
            raise RuntimeError(f"{self._path} is not complete: leave its `with` first")
        return self._entry

    def write(self, piece: Tensor) -> None:
        """Append elements.

        Args:
            piece: [n] on the CPU, contiguous, of the dtype of the part that it is of; any number of elements
                up to the end of that part.

        Raises ValueError for a piece that does not fit, OSError.
        """
        part = self._part
        if part is None:
            raise ValueError(f"{self._path}: all its parts are written")
        if piece.dtype != part.dtype or piece.device.type != "cpu" or not piece.is_contiguous():
            found = f"{piece.dtype} on {piece.device}"
            raise ValueError(f"{part.entry}: a piece of {found}, not contiguous {part.dtype} on the CPU")
        data = bytes_of(piece)
        if len(data) > self._missing_bytes:
            raise ValueError(
                f"{part.entry}: a piece of {len(data)} bytes, but {self._missing_bytes} are missing"
            )
        self._append(data)
        if not self._missing_bytes:
            self._next_part()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._complete()
        except BaseException:
            self._abandon()
            raise

    def _next_part(self) -> None:
        """Go to the next part that has data; padding in between is written."""
        self._part = None
        for entry in self._coming:
            self._missing_bytes = entry.num_bytes
            if entry.part and entry.num_bytes:
                self._part = entry.part
                return
            self._append(memoryview(bytes(entry.num_bytes)))

    def _append(self, data: memoryview) -> None:
        for first in range(0, len(data), CHUNK_BYTES):
            chunk = data[first : first + CHUNK_BYTES]
            self._hash(chunk)
            _write_all(self._file, chunk)
            self._written_bytes += len(chunk)
            if self._is_local and self._written_bytes - self._started_bytes >= _START_BYTES:
                self._start_on_disk()
        self._missing_bytes -= len(data)
        if not self._missing_bytes:
            self._end_block()

    def _start_on_disk(self) -> None:
        count = self._written_bytes - self._started_bytes
        os.posix_fadvise(self._file.fileno(), self._started_bytes, count, os.POSIX_FADV_DONTNEED)
        self._started_bytes = self._written_bytes

    def _hash(self, data: memoryview) -> None:
        first = 0
        while first < len(data):
            last = min(len(data), first + BLOCK_BYTES - self._block_bytes)
            self._block.update(data[first:last])
            self._block_bytes += last - first
            if self._block_bytes == BLOCK_BYTES:
                self._end_block()
            first = last

    def _end_block(self) -> None:
        if self._block_bytes:
            self._table[self._num_blocks] = self._block.intdigest()
            self._num_blocks += 1
            self._block.reset()
            self._block_bytes = 0

    def _complete(self) -> None:
        if self._part is not None:
            raise ValueError(
                f"{self._path}: {self._missing_bytes} bytes of {self._part.entry} were not written"
            )
        table = self._table.tobytes()
        _write_all(self._file, memoryview(table))
        if self._is_local:
            os.fsync(self._file.fileno())
        self._file.close()
        self._entry = FileEntry(
            self._header.file_bytes, header_xxh3=self._header_xxh3, table_xxh3=digest_of(table)
        )

    def _abandon(self) -> None:
        # The first error is the one to report.
        with suppress(Exception):
            if self._is_local or not hasattr(self._file, "discard"):
                self._file.close()
            else:
                self._file.discard()
                # Or it would be uploaded when Python drops it (fsspec 2026.9).
                self._file.closed = True


def write_parts(path: Path | UPath, parts: Iterable[tuple[Part, Tensor]]) -> FileEntry:
    """Write parts and their tensors ([n], CPU, contiguous) as one file, durably on a local disk.

    Raises ValueError for what does not fit together, naming it, OSError, FileExistsError.
    """
    pairs = list(parts)
    for part, tensor in pairs:
        if tensor.numel() != part.numel:
            raise ValueError(f"{part.entry}: a tensor of {tensor.numel()} elements")
    with PartsWriter(path, [part for part, _ in pairs]) as writer:
        for part, tensor in pairs:
            if part.numel:
                writer.write(tensor)
    return writer.entry


def write_rank(
    folder: Path | UPath, rank: int, parts: Iterable[tuple[Part, Tensor]], num_writers: int
) -> Mapping[str, FileEntry]:
    """Write what a rank holds as `num_writers` files of equal size, a thread each: name -> entry.

    Large parts are cut. Fewer files if there is too little for so many. Raises as `write_parts` does.
    """
    shares = even_shares(list(parts), num_writers)
    names = [f"rank_{rank:05d}_{index}.safetensors" for index in range(len(shares))]
    with ThreadPoolExecutor(max(1, len(names)), "checkpoint-writer") as pool:
        entries = pool.map(lambda name, share: write_parts(folder / name, share), names, shares)
        return dict(zip(names, entries, strict=True))


def even_shares(parts: Sequence[tuple[Part, Tensor]], count: int) -> list[list[tuple[Part, Tensor]]]:
    """Parts in `count` shares of nearly equal bytes, in order; cut between blocks. None is empty."""
    total = sum(part.num_bytes for part, _ in parts)
    count = max(1, min(count, -(-total // BLOCK_BYTES)))
    shares: list[list[tuple[Part, Tensor]]] = [[] for _ in range(count)]
    share = done = 0
    for part, tensor in parts:
        first = 0
        while first < part.numel:
            # Up to a whole block beyond where this share ends.
            room = -(-((share + 1) * total // count - done) // BLOCK_BYTES) * BLOCK_BYTES
            if room <= 0:
                share += 1
                continue
            last = min(part.numel, first + room // part.dtype.itemsize)
            shares[share].append((part.cut(first, last), tensor[first:last]))
            done += (last - first) * part.dtype.itemsize
            first = last
        if not part.numel:
            shares[share].append((part, tensor))
    return [each for each in shares if each]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, of any dtype."""
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _write_all(file: _File, data: memoryview) -> None:
    while len(data):
        written = file.write(data)
        # Files of fsspec take all, and some say nothing.
        data = data[len(data) if written is None else written :]
