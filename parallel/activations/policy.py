"""What can be done with a tensor that waits for the backward pass. Standard library only."""

from enum import Enum


class Policy(Enum):
    """Where and how a saved tensor waits."""

    keep = "keep"
    """On the device, as it is."""
    recompute = "recompute"
    """Nowhere: what made it is run again. Only for tensors that the model makes with `recomputed`."""
    fp8 = "fp8"
    """On the device, as E4M3 in tiles of 1x128 with float32 scales."""
    offload = "offload"
    """In host memory."""
    fp8_offload = "fp8+offload"
    """In host memory, as E4M3."""

    @property
    def compresses(self) -> bool:
        """Whether a number comes back rounded."""
        return self in (Policy.fp8, Policy.fp8_offload)

    @property
    def offloads(self) -> bool:
        """Whether it takes host memory."""
        return self in (Policy.offload, Policy.fp8_offload)
