"""Parts put together to shards in megatron-core's indexed form, streamed, with memory that is bounded.

The form is that of megatron-core 0.19.2 (`megatron/core/datasets/indexed_dataset.py`, `_IndexWriter`): `.bin`
has nothing but ids; `.idx` has a magic, version 1, a code of the ids' type, the numbers of sequences and of
document ends, then each sequence's length (int32) and byte (int64), and the first sequence of each document
with the end of the last (int64). Here each document is one sequence.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from k25_train.data.prepare.manifest import read_json, write_json
from k25_train.data.prepare.parts import PartReport, Parts
from k25_train.data.prepare.units import Unit
from k25_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPE_CODES = {"<u2": 8, "<i4": 4}
"""Codes of `DType` there."""
_COPY_BYTES = 2**23
_NUMBERS_AT_ONCE = 2**20


class Slice(NamedTuple):
    """Consecutive documents of a part."""

    unit: Unit
    start: int
    stop: int
    first_token: int
    num_tokens: int

    @property
    def num_documents(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """What one shard holds."""

    number: int
    slices: Sequence[Slice]

    @property
    def num_documents(self) -> int:
        """Documents, each one sequence."""
        return sum(each.num_documents for each in self.slices)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(each.num_tokens for each in self.slices)


def slices_of(
    units: Iterable[tuple[Unit, PartReport]], dropped: Mapping[int, Sequence[int]], parts: Parts
) -> Iterator[Slice]:
    """All documents of all parts in order, but for those dropped: unit's number -> their positions in it."""
    for unit, report in units:
        if unit.number in dropped:
            yield from _between(unit, [-1, *dropped[unit.number], report.num_documents], parts)
        elif report.num_documents:
            yield Slice(unit, 0, report.num_documents, 0, report.num_tokens)


def _between(unit: Unit, limits: Sequence[int], parts: Parts) -> Iterator[Slice]:
    starts = np.concatenate([[0], np.cumsum(parts.lengths(unit), dtype=np.int64)])
    for before, behind in pairwise(limits):
        if before + 1 < behind:
            first = int(starts[before + 1])
            yield Slice(unit, before + 1, behind, first, int(starts[behind]) - first)


def into_shards(slices: Iterable[Slice], shard_tokens: int, parts: Parts) -> list[Shard]:
    """Documents in shards of at most `shard_tokens`, or of one document that is longer."""
    shards: list[Shard] = []
    current: list[Slice] = []
    room = shard_tokens
    for whole in slices:
        rest = whole
        while rest.num_documents:
            fits = rest if rest.num_tokens <= room else _beginning(rest, room, parts)
            if not fits.num_documents and not current:
                fits = _beginning(rest, room, parts, at_least=1)
            if fits.num_documents:
                current.append(fits)
                room -= fits.num_tokens
                rest = Slice(
                    rest.unit,
                    fits.stop,
                    rest.stop,
                    fits.first_token + fits.num_tokens,
                    rest.num_tokens - fits.num_tokens,
                )
            if rest.num_documents:
                shards.append(Shard(len(shards), current))
                current, room = [], shard_tokens
    if current:
        shards.append(Shard(len(shards), current))
    return shards


def _beginning(whole: Slice, room: int, parts: Parts, at_least: int = 0) -> Slice:
    """The documents that fit, but no fewer than `at_least`."""
    ends = np.cumsum(parts.lengths(whole.unit)[whole.start : whole.stop], dtype=np.int64)
    num = max(at_least, int(np.searchsorted(ends, room, side="right")))
    return Slice(
        whole.unit, whole.start, whole.start + num, whole.first_token, int(ends[num - 1]) if num else 0
    )


def write_shard(
    prefix: Path,
    shard: Shard,
    parts: Parts,
    dtype: np.dtype[np.generic],
    facts: Mapping[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Write a shard's files, each whole or not at all; `facts` and counts go to the last, `PREFIX.json`.

    `progress` is called with bytes of tokens so far. Raises OSError if a file cannot be written.
    """
    if shard_is_written(prefix, shard, dtype, facts):
        return
    with _Committed(prefix, ".bin") as file:
        _copy_tokens(file, shard, parts, dtype.itemsize, progress)
    with _Committed(prefix, ".idx") as file:
        _write_index(file, shard, parts, dtype)
    write_json(prefix.with_name(f"{prefix.name}.json"), _facts(shard, dtype, facts))


def shard_is_written(
    prefix: Path, shard: Shard, dtype: np.dtype[np.generic], facts: Mapping[str, Any]
) -> bool:
    """Whether all of a shard's files are there."""
    try:
        num_bytes = os.stat(f"{prefix}.bin").st_size
    except FileNotFoundError:
        return False
    is_whole = num_bytes == shard.num_tokens * dtype.itemsize and os.path.exists(f"{prefix}.idx")
    return is_whole and read_json(Path(f"{prefix}.json")) == _facts(shard, dtype, facts)


def _facts(shard: Shard, dtype: np.dtype[np.generic], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **facts,
        "dtype": dtype.name,
        "num_documents": shard.num_documents,
        "num_tokens": shard.num_tokens,
        "bin_bytes": shard.num_tokens * dtype.itemsize,
    }


class _Committed:
    """A file that has its name once all of it is on disk."""

    def __init__(self, prefix: Path, suffix: str) -> None:
        self._path = prefix.with_name(f"{prefix.name}{suffix}")
        self._scratch = prefix.with_name(f"{prefix.name}{suffix}.partial")

    def __enter__(self) -> BinaryIO:
        self._file = self._scratch.open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._scratch, self._path)
        finally:
            self._file.close()
            self._scratch.unlink(missing_ok=True)


def _copy_tokens(
    out: BinaryIO, shard: Shard, parts: Parts, token_bytes: int, progress: Callable[[int], None]
) -> None:
    copied = 0
    for each in shard.slices:
        path = parts.tokens(each.unit)
        left = each.num_tokens * token_bytes
        with path.open("rb", buffering=0) as file:
            file.seek(each.first_token * token_bytes)
            while left:
                data = file.read(min(left, _COPY_BYTES))
                if not data:
                    raise DataError(
                        f"{path}: ends early. Files were changed from outside: start over with --restart."
                    )
                out.write(data)
                left -= len(data)
                copied += len(data)
                progress(copied)


def _write_index(out: BinaryIO, shard: Shard, parts: Parts, dtype: np.dtype[np.generic]) -> None:
    num = shard.num_documents
    out.write(MAGIC + struct.pack("<QBQQ", VERSION, TYPE_CODES[dtype.str], num, num + 1))
    for lengths in _lengths(shard, parts):
        out.write(lengths.tobytes())
    position = 0
    for lengths in _lengths(shard, parts):
        ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize + position
        out.write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
        position = int(ends[-1])
    for start in range(0, num + 1, _NUMBERS_AT_ONCE):
        out.write(np.arange(start, min(start + _NUMBERS_AT_ONCE, num + 1), dtype="<i8").tobytes())


def _lengths(shard: Shard, parts: Parts) -> Iterator[NDArray[np.int32]]:
    for each in shard.slices:
        yield parts.lengths(each.unit)[each.start : each.stop]
