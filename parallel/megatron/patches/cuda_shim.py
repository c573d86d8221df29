"""What torch.cuda answers when megatron-core runs on the CPU, or is only built, on meta tensors.

megatron-core names CUDA in three ways: it calls `torch.cuda.*`, it passes `device="cuda"` to torch's factory
functions, and it moves tensors with `.cuda()`. Each is answered here with the CPU equivalent. The factory
functions are wrapped rather than intercepted by a `TorchFunctionMode`, because such a mode is switched off
while autograd runs backward, and activations are recomputed there.

Streams and events become no-ops: on the CPU every operation has finished when it returns, so there is
nothing to order. `torch.cuda.is_available()` keeps answering False, and what torch itself answers without a
GPU (`torch.cuda.stream`, `torch.cuda.empty_cache`) is left alone.

In a dry run "meta" stands in for CUDA instead: tensors have shapes and no data, and take no memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")

FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros")
"""Those that megatron-core calls with a literal "cuda" in the parts that training uses."""


class CpuStream:
    """A CUDA stream on a machine without one: work is done when it is submitted."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else CpuEvent()


class CpuEvent:
    """A CUDA event on a machine without one: always reached."""

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
            kwargs["device"] = _STAND_IN
        return factory(*args, **kwargs)

    return create


def _rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _do_nothing(*_: Any, **__: Any) -> None: ...


_STAND_IN = CPU
_INSTALLED = False


def install(stand_in: torch.device = CPU) -> None:
    """Answer torch.cuda with the CPU, in this process, for good; tensors live on `stand_in`, CPU or meta.

    Idempotent; called again, it changes the device.
    """
    global _INSTALLED, _STAND_IN
    _STAND_IN = stand_in
    if _INSTALLED:
        return
    _INSTALLED = True
    answers: dict[str, Any] = {
        "current_device": lambda: _STAND_IN,
        "current_stream": lambda *_: _CURRENT_STREAM,
        "Stream": CpuStream,
        "Event": CpuEvent,
        "synchronize": _do_nothing,
        "get_rng_state": _rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # `with torch.device("meta")` looks functions up in a set that torch fills at first use and keeps: fill it
    # while it still names the originals, which is what the wrappers below call.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = _do_nothing  # type: ignore[method-assign]
