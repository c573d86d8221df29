"""What can be done with a saved tensor until its backward pass. Standard library only."""

from enum import Enum


class Policy(Enum):
    """Where and how a saved tensor is held."""

    keep = "keep"
    """On the device, unchanged."""
    recompute = "recompute"
    """Nowhere: the function that made it is run again. Only for what the model makes with `recomputed`."""
    fp8 = "fp8"
    """On the device, as E4M3 in tiles of 1x128 with float32 scales."""
    offload = "offload"
    """In host memory."""
    fp8_offload = "fp8+offload"
    """In host memory, as E4M3."""

    @property
    def compresses(self) -> bool:
        """Whether values are rounded."""
        return self in (Policy.fp8, Policy.fp8_offload)

    @property
    def offloads(self) -> bool:
        """Whether the tensor is held in host memory."""
        return self in (Policy.offload, Policy.fp8_offload)
