"""Gradient buffers as megatron-core lays them out, and what of them each rank updates; torch-free.

The parameters of a module that share an update rule and their data-parallel ranks lie in one buffer, from the
last to the first, each at a multiple of 64 elements, in buckets that end at a multiple of 128 and of the
ranks (megatron-core 0.19.2, `optimizer/param_layout.py`, and `_compute_per_buffer_param_layout` in
`distrib_optimizer.py`). Weights lie the same way. A rank updates an equal stretch of each bucket.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

START_ALIGNMENT = 64
"""Elements at whose multiples parameters begin."""
END_ALIGNMENT = 128
"""Elements at whose multiples buckets end, next to the number of ranks."""
SMALLEST_BUCKET = 40_000_000
"""Elements after which a bucket is full, where buckets are reduced one by one."""
BUCKET_PER_RANK = 1_000_000
"""The same for each data-parallel rank, if that is more."""


def bucket_elements(dp: int) -> int:
    """Elements after which a bucket is full."""
    return max(SMALLEST_BUCKET, BUCKET_PER_RANK * dp)


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """One buffer."""

    buckets: tuple[tuple[int, int], ...]
    """Start and end of each bucket, padding included."""
    ranges: tuple[tuple[int, int], ...]
    """Start and end of each parameter, ascending."""
    num_shards: int
    """Ranks that share it."""

    @property
    def num_elements(self) -> int:
        """Elements of the buffer, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def shards(self) -> tuple[tuple[int, int], ...]:
        """[rank] -> elements of parameters in its stretches, and parameters of which it has some."""
        return _shards(self)


def plan_buffer(sizes: Sequence[int], num_shards: int, bucket_size: int | None = None) -> BufferPlan:
    """The buffer of parameters with so many elements each, in the order of their module.

    Args:
        sizes: of the parameters.
        num_shards: ranks that share it.
        bucket_size: elements after which a bucket is full; None is one bucket.
    """
    divisor = math.lcm(num_shards, END_ALIGNMENT)
    buckets: list[tuple[int, int]] = []
    ranges: list[tuple[int, int]] = []
    first = end = 0
    is_open = False
    for size in reversed(sizes):
        start = -(-end // START_ALIGNMENT) * START_ALIGNMENT
        end = start + size
        ranges.append((start, end))
        is_open = True
        if bucket_size is not None and end - first >= bucket_size:
            end = -(-end // divisor) * divisor
            buckets.append((first, end))
            first, is_open = end, False
    if is_open:
        buckets.append((first, -(-end // divisor) * divisor))
    return BufferPlan(tuple(buckets), tuple(ranges), num_shards)


# Layouts that a search compares have many buffers in common.
@lru_cache(maxsize=32)
def _shards(buffer: BufferPlan) -> tuple[tuple[int, int], ...]:
    elements, parts = [0] * buffer.num_shards, [0] * buffer.num_shards
    position = 0
    for first, last in buffer.buckets:
        size = (last - first) // buffer.num_shards
        while position < len(buffer.ranges) and buffer.ranges[position][1] <= last:
            start, end = buffer.ranges[position]
            position += 1
            if start == end:
                continue
            for shard in range((start - first) // size, (end - 1 - first) // size + 1):
                begin = first + shard * size
                elements[shard] += min(end, begin + size) - max(start, begin)
                parts[shard] += 1
    return tuple(zip(elements, parts, strict=True))
