"""Checkpoints of jobs of any size without a byte on disk: what is in them, and what a load asks for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from k25_train.checkpoint.files.header import LENGTH_BYTES, lay_out
from k25_train.checkpoint.files.index import PartIndex, combine, index_of
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.reader import plan
from k25_train.checkpoint.files.stored import StoredCheckpoint, Wanted, complete_index
from k25_train.checkpoint.files.writer import even_shares
from k25_train.checkpoint.loading import LOAD_STAGING_BYTES, batches
from k25_train.checkpoint.manifest import FileEntry, Manifest
from k25_train.checkpoint.pieces import Piece


class VirtualCheckpoint(NamedTuple):
    """A checkpoint as ranks would have written it."""

    stored: StoredCheckpoint
    header_bytes: int
    """Of all files: what reading them all asks for."""
    num_bytes: int
    """Of all files."""


def on_meta(part: Part) -> Piece:
    """A piece without memory."""
    return Piece(part, torch.empty(part.numel, dtype=part.dtype, device="meta"))


def written_by(by_rank: Sequence[Sequence[Part]], num_writers: int) -> VirtualCheckpoint:
    """What ranks with these parts write, in files of `num_writers` threads each."""
    indexes: list[PartIndex] = []
    files: dict[str, FileEntry] = {}
    header_bytes = 0
    for rank, parts in enumerate(by_rank):
        headers = {}
        pairs = [(part, on_meta(part).tensor) for part in parts]
        for number, share in enumerate(even_shares(pairs, num_writers)):
            name = f"rank_{rank:05d}_{number}.safetensors"
            headers[name], start = lay_out([part for part, _ in share])
            # The length is read first, then both together.
            header_bytes += LENGTH_BYTES + len(start)
            files[name] = FileEntry(headers[name].file_bytes, header_xxh3="-", table_xxh3="-")
        indexes.append(index_of(headers))
    folder = Path("step_1")
    manifest = Manifest(step=1, files=files, facts={}, num_updates=1)
    stored = StoredCheckpoint(folder, manifest, complete_index(folder, [combine(indexes)]))
    return VirtualCheckpoint(stored, header_bytes, sum(entry.num_bytes for entry in files.values()))


def asked_by(checkpoint: VirtualCheckpoint, parts: Sequence[Part], is_direct: Callable[[Part], bool]) -> int:
    """Bytes of files that a rank with these parts asks for when it loads, headers left out.

    Args:
        checkpoint: what it loads.
        parts: of its pieces.
        is_direct: whether a piece is read straight to where it belongs.
    """
    direct = [on_meta(part) for part in parts if is_direct(part)]
    staged = [on_meta(part) for part in parts if not is_direct(part)]
    index, files = checkpoint.stored.parts, checkpoint.stored.manifest.files
    num_bytes, touched = 0, set[int]()
    for batch in [direct, *batches(checkpoint.stored, staged, LOAD_STAGING_BYTES)]:
        wanted = [Wanted(each.part.name, each.part.start, each.part.stop) for each in batch]
        job = plan(index, checkpoint.stored.overlaps(wanted), is_local=True)
        num_bytes += job.num_bytes
        touched |= set(job.reads.files.tolist())
    tables = (files[index.files[file]].num_bytes - int(index.table_offset[file]) for file in touched)
    return num_bytes + sum(tables)
