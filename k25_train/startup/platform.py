"""What every command does before it imports megatron-core: quiet the libraries and choose the device."""

import os

import torch

from k25_train.config.cluster import ClusterConfig
from k25_train.errors import ConfigError
from k25_train.startup import numa
from k25_train.startup.quiet import quiet_libraries
from parallel.megatron.platform import use_platform


def prepare_device(cluster: ClusterConfig) -> torch.device:
    """The device of this process, ready for megatron-core. With a GPU, it runs near it from here on.

    Raises `ConfigError` if there is no such device or megatron-core has another version.
    """
    device = prepare_platform(cluster.device.value)
    if device.type == "cuda":
        bind_near(device)
    return device


def bind_near(device: torch.device) -> None:
    """Run on the CPUs of the GPU's NUMA node. Rank 0 says so, and every rank that cannot."""
    gpus = [pci_address(number) for number in range(torch.cuda.device_count())]
    bound = numa.bind(gpus, device.index, os.environ)
    rank = os.environ.get("RANK", "0")
    if bound.is_flawed or (bound.text and rank == "0"):
        print(f"rank {rank} {bound.text}", flush=True)


def pci_address(number: int) -> str:
    """Address of a visible GPU, as the kernel writes it."""
    properties = torch.cuda.get_device_properties(number)
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def prepare_platform(device_type: str) -> torch.device:
    """The device of a type, "cpu", "cuda" or, in a dry run, "meta", ready for megatron-core.

    Raises `ConfigError` as `prepare_device` does.
    """
    quiet_libraries()
    try:
        return use_platform(device_type)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
