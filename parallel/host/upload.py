"""Small tensors that the host makes for the device in the middle of a step."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device; the host does not wait.

    For CUDA it goes through page-locked memory, of which torch keeps what it has once allocated, and which it
    does not hand out again before the copy is whole. From other memory the driver may copy before it returns.
    A tensor that is there already is returned.
    """
    source = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return source.to(device, non_blocking=True)
