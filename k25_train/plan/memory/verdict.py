"""Whether a configuration fits its devices and hosts, with which margin, and what would help; torch-free."""

from dataclasses import dataclass
from enum import Enum

from k25_train.plan.memory.remedies import Remedy


class Fit(Enum):
    """How a configuration fits."""

    fits = "fits"
    """With room for experts that get more tokens than others, and for what no plan knows."""
    tight = "tight"
    """With less room than that: the allocator may have to return memory, which is slow, or run out of it."""
    does_not_fit = "does not fit"
    """Not even if all goes as planned."""


@dataclass(frozen=True, kw_only=True)
class MemoryVerdict:
    """Device and host memory, next to what there is."""

    fit: Fit
    """The worse of device and host."""
    stage: int
    """Stage whose ranks have the fullest devices."""
    allocated_bytes: float
    """Peak of tensors on such a device, as torch's allocator counts them."""
    device_bytes: float
    """Everything on it: tensors, the allocator's slack, CUDA, NCCL."""
    limit_bytes: float | None
    """What the device has; None where the device is the CPU, which always fits."""
    load_bytes: float
    """Peak of a device while a run is resumed from a checkpoint."""
    node_bytes: float
    """Host memory of the fullest node."""
    node_limit_bytes: float
    """What a node has."""
    remedy: Remedy | None
    """The cheapest change found that makes it fit; None if it fits already, or if none was looked for."""

    @property
    def margin_bytes(self) -> float | None:
        """Device memory that is left; negative if there is too little."""
        return None if self.limit_bytes is None else self.limit_bytes - self.device_bytes
