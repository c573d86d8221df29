"""What every command does before it imports megatron-core: quiet the libraries and choose the device."""

import os
from collections.abc import Mapping

import torch

from k25_train.config.cluster import ClusterConfig
from k25_train.errors import ConfigError
from k25_train.startup.near_gpu import bind_near
from k25_train.startup.quiet import quiet_libraries
from parallel.megatron.platform import use_platform

BLOCKING = ("CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
"""Variables with which the host waits for each kernel, or each exchange."""


def prepare_device(cluster: ClusterConfig) -> torch.device:
    """The device of this process, ready for megatron-core. With a GPU, it runs near it from here on.

    Raises `ConfigError` if there is no such device or megatron-core has another version.
    """
    device = prepare_platform(cluster.device.value)
    if device.type == "cuda":
        check_nothing_blocks(os.environ)
        bind_near(device)
    return device


def check_nothing_blocks(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` for variables with which a rank waits for each operation that it starts: one that
    posts what it is to receive ahead of time would wait for a sender that waits for it."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return
    for name in BLOCKING:
        if environment.get(name, "0") not in ("", "0"):
            raise ConfigError(
                f"{name}={environment[name]} in the environment: ranks would wait for each other in a "
                "circle, as each then waits for what it starts: unset it, or debug with one rank"
            )


def prepare_platform(device_type: str) -> torch.device:
    """The device of a type, "cpu", "cuda" or, in a dry run, "meta", ready for megatron-core.

    Raises `ConfigError` as `prepare_device` does.
    """
    quiet_libraries()
    try:
        return use_platform(device_type)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
