"""What every command does before it imports megatron-core: quiet the libraries and choose the device."""

import torch

from k25_train.config.cluster import ClusterConfig
from k25_train.errors import ConfigError
from k25_train.startup.quiet import quiet_libraries
from parallel.megatron.platform import use_platform


def prepare_device(cluster: ClusterConfig) -> torch.device:
    """The device of this process, ready for megatron-core.

    Raises `ConfigError` if there is no such device or megatron-core has another version.
    """
    return prepare_platform(cluster.device.value)


def prepare_platform(device_type: str) -> torch.device:
    """The device of a type, "cpu", "cuda" or, in a dry run, "meta", ready for megatron-core.

    Raises `ConfigError` as `prepare_device` does.
    """
    quiet_libraries()
    try:
        return use_platform(device_type)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
