"""Replaces torch.cuda when megatron-core runs on the CPU, or is only built, on meta tensors.

megatron-core names CUDA in three ways: it calls `torch.cuda.*`, it passes `device="cuda"` to torch's factory
functions, and it moves tensors with `.cuda()`. Each gets its CPU equivalent here. The factory functions
are wrapped rather than intercepted by a `TorchFunctionMode`, because such a mode is off while autograd runs
backward, and activations are recomputed there.

Streams and events become no-ops: on the CPU every operation has finished when it returns, so there is
nothing to order. `torch.cuda.is_available()` still returns False, and what works in torch without a GPU
(`torch.cuda.stream`, `torch.cuda.empty_cache`) is unchanged.

In a dry run the meta device replaces CUDA instead: tensors have shapes and no data, and take no memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")

FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros")
"""Factory functions that megatron-core calls with a literal "cuda" in the parts that training uses."""


class CpuStream:
    """A CUDA stream on a machine without a GPU: work is complete when it is submitted."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else CpuEvent()


class CpuEvent:
    """A CUDA event on a machine without a GPU: always complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


_CURRENT_STREAM = CpuStream()


def names_cuda(device: Any) -> bool:
    """Whether a `device=` argument asks for CUDA: "cuda", "cuda:1" or torch.device("cuda")."""
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if names_cuda(kwargs.get("device")):
            kwargs["device"] = _DEVICE
        return factory(*args, **kwargs)

    return create


def _rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _do_nothing(*_: Any, **__: Any) -> None: ...


_DEVICE = CPU
_INSTALLED = False


def install(device: torch.device = CPU) -> None:
    """Replace torch.cuda permanently in this process; tensors are created on `device`, CPU or meta.

    Idempotent; another call changes the device.
    """
    global _INSTALLED, _DEVICE
    _DEVICE = device
    if _INSTALLED:
        return
    _INSTALLED = True
    replacements: dict[str, Any] = {
        "current_device": lambda: _DEVICE,
        "current_stream": lambda *_: _CURRENT_STREAM,
        "Stream": CpuStream,
        "Event": CpuEvent,
        "synchronize": _do_nothing,
        "get_rng_state": _rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    # `with torch.device("meta")` looks functions up in a set that torch fills at first use: fill it while it
    # still has the originals, which the wrappers below call.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = _do_nothing  # type: ignore[method-assign]
