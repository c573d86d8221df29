"""Bytes of a saved tensor in each form; standard library only, so that planning needs no torch."""

import math
from collections.abc import Sequence

TILE = 128
"""Elements that share an FP8 scale, along the last dimension."""
SMALLEST_OFFLOADED_BYTES = 4096
"""Smaller tensors are kept instead of offloaded: a copy would cost more than it frees. Our choice."""
OUTPUTS_IN_FLIGHT = 2
"""Chunk outputs that may still be in flight to the next stage when another is made: before a schedule goes on
from the next output, it waits until this one is sent."""
BLOCK_BYTES = 512
"""Granularity of blocks of host memory: the alignment of torch's own allocator on a GPU."""


def fp8_bytes(shape: Sequence[int]) -> int:
    """Bytes of a tensor [..., hidden] in FP8: one per element, four per tile. Scalars have no FP8 form."""
    *leading, hidden = shape
    return math.prod(leading) * (hidden + 4 * -(-hidden // TILE))


def block_bytes(num_bytes: int) -> int:
    """Host memory, in bytes, that a tensor of `num_bytes` occupies."""
    return -(-max(num_bytes, 1) // BLOCK_BYTES) * BLOCK_BYTES
