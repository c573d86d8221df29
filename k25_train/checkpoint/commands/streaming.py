"""Reading a checkpoint part by part, several at a time: memory does not depend on sizes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k25_train.checkpoint.files.index import PartIndex
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.units import MIB
from parallel.reshard.ranges import Overlaps, Ranges

JOB_BYTES = 32 * MIB
"""What a thread reads and looks at in one go. Our choice: of 16 threads, with both sides of a difference and
their float64 copies, 5 GB at most."""


@dataclass(frozen=True, slots=True)
class Job:
    """Ranges of stored parts, each of one part."""

    which: NDArray[np.intp]
    """Which part."""
    ranges: Ranges
    """Which elements, of which tensor."""
    names: tuple[str, ...]
    """The tensor of each."""

    def alone(self) -> Iterator["Job"]:
        """Each range as a job."""
        for number, name in enumerate(self.names):
            which = np.arange(number, number + 1)
            ranges = self.ranges.take(which)
            yield Job(self.which[which], ranges, (name,))


def jobs(index: PartIndex, tensors: Iterable[str] | None = None) -> Iterator[Job]:
    """All parts, or those of some tensors, in the order in which they lie in their files.

    Large parts are cut where a block begins; of small ones several are a job, as there may be millions.
    """
    names, itemsizes = index.names, index.itemsizes
    order = np.lexsort((index.offset, index.file))
    if tensors is not None:
        wanted = np.isin(np.array(names), list(tensors))
        order = order[wanted[index.ranges.tensor[order]]]
    rows: list[tuple[int, int, int]] = []
    room = JOB_BYTES
    for part in order.tolist():
        size = int(itemsizes[index.ranges.tensor[part]])
        step = JOB_BYTES // size
        start, end = int(index.ranges.start[part]), int(index.ranges.stop[part])
        for first in range(start, end, step):
            last = min(first + step, end)
            if rows and (last - first) * size > room:
                yield _job(index, names, rows)
                rows, room = [], JOB_BYTES
            rows.append((part, first, last))
            room -= (last - first) * size
    if rows:
        yield _job(index, names, rows)


def read(stored: StoredCheckpoint, job: Job) -> list[Tensor]:
    """The elements of each range, [n] of the stored dtype. Raises as `StoredCheckpoint.read` does."""
    infos = [stored.tensors[name] for name in job.names]
    found = [
        torch.empty(int(numel), dtype=info.dtype) for numel, info in zip(job.ranges.numel, infos, strict=True)
    ]
    stored.read_parts(Overlaps(np.arange(len(found)), job.which, job.ranges), found)
    return found


def in_threads[J, R](work: Callable[[J], R], each: Iterable[J], num_threads: int) -> Iterator[tuple[J, R]]:
    """Jobs with their results, in order; few more are begun than there are threads."""
    waiting: deque[tuple[J, Future[R]]] = deque()
    with ThreadPoolExecutor(num_threads, "checkpoint") as pool:
        try:
            for job in each:
                waiting.append((job, pool.submit(work, job)))
                if len(waiting) > 2 * num_threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _job(index: PartIndex, names: Sequence[str], rows: list[tuple[int, int, int]]) -> Job:
    columns = np.array(rows, dtype=np.int64).T
    which = columns[0].astype(np.intp)
    tensors = index.ranges.tensor[which]
    ranges = Ranges(tensors, columns[1].copy(), columns[2].copy())
    return Job(which, ranges, tuple(names[tensor] for tensor in tensors))
