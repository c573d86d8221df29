"""What a saved tensor takes in each form; standard library only, so that plans can count without torch."""

import math
from collections.abc import Sequence

TILE = 128
"""Elements that share an FP8 scale, along the last dimension."""
SMALLEST_OFFLOADED_BYTES = 4096
"""Smaller tensors are kept instead of offloaded: a copy would cost more than it frees. Our choice."""
OUTPUTS_IN_FLIGHT = 2
"""Outputs of chunks that may still be on their way to the next stage when another is made: the schedules wait
until one is sent before they go on from the next one."""
BLOCK_BYTES = 512
"""Blocks of host memory are multiples of it: the alignment of torch's own allocator on a GPU."""


def stored_bytes(shape: Sequence[int]) -> int:
    """Bytes that a tensor [..., hidden] takes in FP8: one an element, four a tile. A scalar has none."""
    *leading, hidden = shape
    return math.prod(leading) * (hidden + 4 * -(-hidden // TILE))


def block_bytes(num_bytes: int) -> int:
    """Host memory that a tensor of so many bytes occupies."""
    return -(-max(num_bytes, 1) // BLOCK_BYTES) * BLOCK_BYTES
