"""What `train.deterministic` asks of libraries by environment variables; they read them when they start."""

from typing import NamedTuple

from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.training import TrainConfig


class Setting(NamedTuple):
    """A variable of every rank."""

    name: str
    value: str
    reason: str


DETERMINISTIC = (
    Setting(
        "CUBLAS_WORKSPACE_CONFIG",
        ":4096:8",
        "cuBLAS takes a workspace of its own per stream: shared ones change the order of sums",
    ),
    Setting(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "0",
        "Transformer Engine leaves out attention that adds up gradients in any order",
    ),
    Setting(
        "NCCL_ALGO",
        "Ring",
        "gradients are added up along one ring; a choice, or the switches, could change the order",
    ),
)
"""Sources: cuBLAS's documentation, results reproducibility; Transformer Engine's documentation of environment
variables, and megatron-core 0.19.2, which refuses `deterministic_mode` without it; NCCL's user guide."""


def deterministic_settings(train: TrainConfig, cluster: ClusterConfig) -> tuple[Setting, ...]:
    """The variables of a run; none on the CPU, which computes alike in every run anyway."""
    return DETERMINISTIC if train.deterministic and cluster.device is Device.cuda else ()
