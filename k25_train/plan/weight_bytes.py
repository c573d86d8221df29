"""Bytes that one weight takes: itself, its gradient, and what the optimizer keeps of it; torch-free."""

from k25_train.config.basics import DType
from k25_train.config.optimizer import OptimName

WEIGHT_BYTES = {DType.float32: 4, DType.bfloat16: 2}
"""Bytes of a weight that forward and backward use."""
GRADIENT_BYTES = 4
"""Gradients are summed in float32, whatever the weights are."""
MASTER_BYTES = {DType.float32: 0, DType.bfloat16: 4}
"""Bytes of a weight's float32 master, cut over data-parallel ranks (ZeRO-1) as all optimizer state is; a
float32 weight is its own."""
MOMENT_BYTES = {OptimName.adamw: 8, OptimName.muonclip: 4}
"""Bytes of what the update of a weight remembers: AdamW two float32 moments, Muon a float32 momentum."""


HOST_MASTER_BYTES = 4
"""Bytes of a weight's master in host memory (`optim.offload=cpu`), a float32 weight's among them."""


def state_bytes(update: OptimName, dtype: DType) -> int:
    """Bytes of optimizer state of one weight, over all data-parallel ranks."""
    return MASTER_BYTES[dtype] + MOMENT_BYTES[update]


def host_state_bytes(update: OptimName) -> int:
    """Bytes of optimizer state of one weight in host memory, over all data-parallel ranks. In a step they
    pass through the device, once in each direction."""
    return HOST_MASTER_BYTES + MOMENT_BYTES[update]
