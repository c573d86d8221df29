"""Memory for offloaded activations; torch-free."""

from dataclasses import dataclass

from k25_train.config.schema import Config


@dataclass(frozen=True, slots=True)
class OffloadBudget:
    """Memory of one rank."""

    host_bytes: int
    device_bytes: int


def offload_budget(config: Config, stage: int) -> OffloadBudget:
    """What a rank of a pipeline stage needs."""
    return OffloadBudget(256 << 20, 16 << 20)
