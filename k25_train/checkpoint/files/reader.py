"""Reading ranges of files of parts: each block once, compared with its checksum, then copied to its place.

Memory: a staging buffer of at most two chunks per thread, and the tables of the files that are touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local

import numpy as np
import xxhash
from numpy.typing import NDArray
from upath import UPath

from k25_train.checkpoint.files.access import Buffer, OpenFile, opened, read_bytes
from k25_train.checkpoint.files.damage import damage
from k25_train.checkpoint.files.header import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    Header,
    digest_of,
    header_length,
    parse,
)
from k25_train.checkpoint.files.index import PartIndex
from k25_train.checkpoint.manifest import FileEntry
from k25_train.plan.memory.checkpoint import READ_CHUNK_BYTES
from parallel.reshard.ranges import Overlaps
from parallel.reshard.reads import Numbers, ReadPlan, Slices, plan_reads

NUM_THREADS = 4
"""Reads at a time of a rank. Eight ranks of a node have 32 in flight."""
LOCAL_CHUNK_BYTES = 16 * BLOCK_BYTES
"""What is read at once from a disk: 4 MiB."""
GAP_BYTES = 64 * 1024
"""What is read in vain rather than by another request."""
_READS_PER_TASK = 16


@dataclass(frozen=True, slots=True)
class Job:
    """Reads, and what becomes of what they bring: an entry per slice of `reads`."""

    reads: ReadPlan
    """What is read."""
    low: Numbers
    """First byte in the file of the blocks that a slice touches."""
    high: Numbers
    """One after their last."""
    block: Numbers
    """Checksum of the first of them, in the table of the file."""
    place: Numbers
    """Where its first byte goes, in the destination of its overlap."""
    part: NDArray[np.intp]
    """Which part of the index it is of."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are asked of storage, the tables of checksums not counted."""
        return self.reads.num_bytes


def plan(index: PartIndex, wanted: Overlaps, *, is_local: bool) -> Job:
    """What reading these ranges asks of storage."""
    size = index.itemsizes[wanted.ranges.tensor]
    entry_start = index.offset[wanted.stored]
    origin = entry_start - index.ranges.start[wanted.stored] * size
    slices = Slices(
        file=index.file[wanted.stored],
        start=origin + wanted.ranges.start * size,
        stop=origin + wanted.ranges.stop * size,
        entry_start=entry_start,
        entry_stop=entry_start + index.length[wanted.stored],
    )
    chunk_bytes = LOCAL_CHUNK_BYTES if is_local else READ_CHUNK_BYTES
    reads = plan_reads(slices, block_bytes=BLOCK_BYTES, chunk_bytes=chunk_bytes, gap_bytes=GAP_BYTES)
    low, high = reads.slices.in_blocks(BLOCK_BYTES)
    part = wanted.stored[reads.origin]
    return Job(
        reads=reads,
        low=low,
        high=high,
        block=index.block[part] + (low - reads.slices.entry_start) // BLOCK_BYTES,
        place=reads.slices.start - slices.start[reads.origin],
        part=part,
    )


class PartsReader:
    """Reads ranges of the files of a checkpoint. Threads may share it."""

    def __init__(
        self,
        folder: Path | UPath,
        files: Mapping[str, FileEntry],
        index: PartIndex,
        *,
        compares: bool = True,
        num_threads: int = NUM_THREADS,
    ) -> None:
        """`compares` blocks with their checksums; without, what is read is taken as it is."""
        self._compares, self._num_threads = compares, num_threads
        self._folder, self._files, self._index = folder, files, index
        self._tables: dict[int, NDArray[np.uint64]] = {}
        self._staging = local()

    def read(self, wanted: Overlaps, destinations: Sequence[Buffer]) -> None:
        """Copy ranges of parts to where they go.

        Args:
            wanted: parts of the index, and the ranges of them.
            destinations: per overlap, [bytes].

        Raises DamagedCheckpointError naming file and tensor for anything that is not as it was written.
        """
        job = plan(self._index, wanted, is_local=isinstance(self._folder, Path))
        tasks = list(_tasks(job.reads))
        if not tasks:
            return
        with ThreadPoolExecutor(min(self._num_threads, len(tasks)), "checkpoint-reader") as pool:
            runs = [pool.submit(self._run, job, destinations, first, last) for first, last in tasks]
            try:
                for run in runs:
                    run.result()
            finally:
                for run in runs:
                    run.cancel()

    def _run(self, job: Job, destinations: Sequence[Buffer], first: int, last: int) -> None:
        """Reads `first` to `last`, all of one file."""
        reads, number = job.reads, int(job.reads.file[first])
        name = self._index.files[number]
        path = self._folder / name
        with damage(self._folder, name, self._holding(job, first)), opened(path) as file:
            table = self._table(number, file)
            for read in range(first, last):
                data, is_final = self._target(job, read, destinations)
                with damage(self._folder, name, self._holding(job, read)):
                    file.read_into(int(reads.start[read]), data)
                if self._compares:
                    self._compare(job, read, table, data)
                if not is_final:
                    _copy(job, read, data, destinations)

    def _target(self, job: Job, read: int, destinations: Sequence[Buffer]) -> tuple[Buffer, bool]:
        """Where to read to, and whether that is final: what one slice wants all of is read in place."""
        reads, slices = job.reads, job.reads.slices
        start, stop = int(reads.start[read]), int(reads.stop[read])
        only = int(reads.first_slice[read])
        is_alone = reads.first_slice[read + 1] == only + 1
        if is_alone and (slices.start[only], slices.stop[only]) == (start, stop):
            place = int(job.place[only])
            return destinations[int(reads.origin[only])][place : place + stop - start], True
        return self._staging_of(stop - start), False

    def _compare(self, job: Job, read: int, table: NDArray[np.uint64], data: Buffer) -> None:
        """Raise ValueError unless every block that is wanted of a read is as it was written."""
        begin = compared = int(job.reads.start[read])
        view = memoryview(data)
        for number in range(int(job.reads.first_slice[read]), int(job.reads.first_slice[read + 1])):
            low, high, block = int(job.low[number]), int(job.high[number]), int(job.block[number])
            for at in range(low, high, BLOCK_BYTES):
                # Two slices may share a block.
                if at < compared:
                    continue
                compared = min(at + BLOCK_BYTES, high)
                expected = int(table[block + (at - low) // BLOCK_BYTES])
                if xxhash.xxh3_64_intdigest(view[at - begin : compared - begin]) != expected:
                    entry = self._index.part(int(job.part[number])).entry
                    raise ValueError(f"bytes {at} to {compared}, of {entry}, are not as they were written")

    def _table(self, number: int, file: OpenFile) -> NDArray[np.uint64]:
        """The checksums of a file, compared with the manifest. Two threads may both read them."""
        if (known := self._tables.get(number)) is not None:
            return known
        name, offset = self._index.files[number], int(self._index.table_offset[number])
        entry = self._files[name]
        data = read_bytes(file, offset, entry.num_bytes - offset)
        if digest_of(data) != entry.table_xxh3:
            raise ValueError("its checksums are not as they were written")
        self._tables[number] = np.frombuffer(data, "<u8")
        return self._tables[number]

    def _staging_of(self, count: int) -> Buffer:
        """Staging memory of this thread."""
        buffer: Buffer | None = getattr(self._staging, "buffer", None)
        if buffer is None or len(buffer) < count:
            buffer = self._staging.buffer = np.empty(count, np.uint8)
        return buffer[:count]

    def _holding(self, job: Job, read: int) -> str:
        return self._index.part(int(job.part[job.reads.first_slice[read]])).entry


def _copy(job: Job, read: int, data: Buffer, destinations: Sequence[Buffer]) -> None:
    """Copy from a read to where its slices go."""
    slices, begin = job.reads.slices, int(job.reads.start[read])
    for number in range(int(job.reads.first_slice[read]), int(job.reads.first_slice[read + 1])):
        start, stop, place = int(slices.start[number]), int(slices.stop[number]), int(job.place[number])
        destination = destinations[int(job.reads.origin[number])]
        destination[place : place + stop - start] = data[start - begin : stop - begin]


def read_headers(folder: Path | UPath, files: Mapping[str, FileEntry]) -> dict[str, Header]:
    """Headers of files of parts, compared with the manifest.

    Raises DamagedCheckpointError naming a file that is not as it was written.
    """
    with ThreadPoolExecutor(4 * NUM_THREADS, "checkpoint-header") as pool:
        headers = pool.map(lambda item: _read_header(folder, *item), files.items())
        return dict(zip(files, headers, strict=True))


def _read_header(folder: Path | UPath, name: str, entry: FileEntry) -> Header:
    with damage(folder, name), opened(folder / name) as file:
        count = header_length(read_bytes(file, 0, LENGTH_BYTES), entry.num_bytes)
        data = read_bytes(file, 0, count)
        if digest_of(data) != entry.header_xxh3:
            raise ValueError("its header is not as it was written")
        return parse(data, entry.num_bytes)


def _tasks(reads: ReadPlan) -> Iterator[tuple[int, int]]:
    """First read and the one after the last of pieces of work, each of one file."""
    first = 0
    for read in range(1, len(reads) + 1):
        if read == len(reads) or reads.file[read] != reads.file[first] or read - first == _READS_PER_TASK:
            yield first, read
            first = read
