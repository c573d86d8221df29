"""Binds a rank to the CPUs near its GPU, of which torch knows the address."""

import os
from typing import Any

import torch

from k25_train.startup import numa


def bind_near(device: torch.device) -> None:
    """Run on the CPUs of the GPU's NUMA node. Rank 0 says so, and every rank that cannot."""
    gpus = [pci_address(number) for number in range(torch.cuda.device_count())]
    bound = numa.bind(gpus, device.index, os.environ)
    rank = os.environ.get("RANK", "0")
    if bound.is_flawed or (bound.text and rank == "0"):
        print(f"rank {rank} {bound.text}", flush=True)


def pci_address(number: int) -> str:
    """Address of a visible GPU, as the kernel writes it."""
    # torch's types do not list these attributes.
    properties: Any = torch.cuda.get_device_properties(number)
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
