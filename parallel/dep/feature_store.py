"""Features and their gradients at rest: on the device up to a bound, then in host memory."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Kept:
    tensor: Tensor
    num_device_bytes: int


class FeatureStore:
    """Tensors by micro-batch. Those put first stay on the device, as they are needed first."""

    def __init__(self, device: torch.device, max_device_bytes: int) -> None:
        self._device = device
        self._max_device_bytes = max_device_bytes
        self._kept: dict[int, _Kept] = {}
        self.device_bytes = 0
        """Bytes on the device now."""
        self.peak_device_bytes = 0
        """The most bytes that were on the device at a time."""

    def put(self, micro_batch: int, tensor: Tensor) -> None:
        """Keep a tensor of the device, in host memory if it does not fit within the bound."""
        fits = self.device_bytes + tensor.nbytes <= self._max_device_bytes
        if not fits:
            tensor = self._to_host(tensor)
        kept = _Kept(tensor, tensor.nbytes if fits else 0)
        self._kept[micro_batch] = kept
        self.device_bytes += kept.num_device_bytes
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def take(self, micro_batch: int) -> Tensor:
        """The tensor, on the device; it is no longer kept."""
        kept = self._kept.pop(micro_batch)
        self.device_bytes -= kept.num_device_bytes
        return kept.tensor.to(self._device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, page-locked on a GPU, so that it can be brought back asynchronously."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        # torch orders the copy before whatever the device does next with the memory of `tensor`.
        return host.copy_(tensor, non_blocking=True)
