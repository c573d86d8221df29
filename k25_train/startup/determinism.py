"""`train.deterministic`: the same bits in every run on CUDA, before any library has chosen its kernels."""

import os

from k25_train.config.cluster import ClusterConfig
from k25_train.config.determinism import deterministic_settings
from k25_train.config.training import TrainConfig
from k25_train.errors import ConfigError


def prepare_determinism(train: TrainConfig, cluster: ClusterConfig) -> None:
    """Choose deterministic kernels, if so configured; call before anything is on the device.

    torch then refuses operations that have none. It does not fill new memory with NaN, which it would do to
    show reads of what nobody wrote, and which no result depends on.

    Raises `ConfigError` if the environment asks a library for something else.
    """
    settings = deterministic_settings(train, cluster)
    for name, value, reason in settings:
        found = os.environ.setdefault(name, value)
        if found != value:
            raise ConfigError(
                f"{name}={found}: must be {value} with train.deterministic=true: {reason}\n"
                f"  -> unset it (launch.slurm and launch.torchrun set it), or use train.deterministic=false"
            )
    if settings:
        import torch

        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
