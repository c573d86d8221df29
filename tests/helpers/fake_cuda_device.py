"""The parts of `torch.cuda` that `fake_cuda` answers: streams, events, memory, and torch's own checks."""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

HOOKS_BEFORE = 4
"""Virtual functions before `hasPrimaryContext` in torch's `AcceleratorHooksInterface`: destructors (2),
`isBuilt`, `isAvailable` (torch 2.13, ATen/detail/AcceleratorHooksInterface.h)."""
HOOKS_COPIED = 96
"""Words of the table of virtual functions that are copied: more than it has."""
_keep_alive: list[Any] = []


class Recorder(Protocol):
    """What records calls that block."""

    pinned: "PinnedMemory"

    def block(self, what: str, why: str) -> None: ...


def let_backward_run() -> None:
    """Have torch run backward passes over tensors that say they are on a GPU. Lasts as long as the process.

    Without a driver, torch's autograd engine asks CUDA whether device 0 is in use, and fails. Here it is told
    that it is: the answer is replaced in the table of torch's hooks into CUDA. Streams are torch's no-op
    ones, as in `FakeTensorMode`.
    """
    if _keep_alive or torch.cuda.device_count():
        return
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks())
    # Two words before the table hold its type.
    words = ctypes.c_void_p * HOOKS_COPIED
    copied = words(*words.from_address((table.value or 0) - 2 * ctypes.sizeof(ctypes.c_void_p)))
    is_in_use = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, device: True)
    copied[2 + HOOKS_BEFORE] = ctypes.cast(is_in_use, ctypes.c_void_p).value
    table.value = ctypes.addressof(copied) + 2 * ctypes.sizeof(ctypes.c_void_p)
    _keep_alive.extend([copied, is_in_use])


class PinnedMemory:
    """Which host memory is page-locked."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._tensors: list[Any] = []
        self.num_made = 0
        """Allocations and registrations so far: each of them is slow, and may wait for the device."""

    def mark(self, tensor: Tensor) -> Tensor:
        """Page-lock the memory of a tensor; it is kept, so that its address stays its own."""
        storage = tensor.untyped_storage()
        self._tensors.append(storage)
        self.register(storage.data_ptr(), storage.nbytes())
        return tensor

    def register(self, address: int, num_bytes: int, flags: int = 0) -> int:
        """Page-lock a range, as `cudaHostRegister`; returns its status."""
        self._ranges.append((address, address + num_bytes))
        self.num_made += 1
        return 0

    def unregister(self, address: int) -> int:
        """Release a range, as `cudaHostUnregister`; returns its status."""
        self._ranges = [each for each in self._ranges if each[0] != address]
        return 0

    def has(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor is page-locked. Memory of no bytes is: nothing is copied."""
        start, num_bytes = tensor.data_ptr(), tensor.untyped_storage().nbytes()
        return num_bytes == 0 or any(low <= start < high for low, high in self._ranges)


class FakeStream:
    """A stream: everything is done when it is submitted."""

    device = torch.device("cuda", 0)
    cuda_stream = stream_id = 0
    seen: Recorder

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else FakeEvent()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.seen.block("Stream.synchronize", "waits for the device")


class FakeEvent:
    """An event: always complete."""

    seen: Recorder

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        self.seen.block("Event.synchronize", "waits for the device")


def answer_for_gpu(seen: Recorder) -> Iterator[AbstractContextManager[Any]]:
    """What replaces functions of torch.cuda; calls that block are recorded."""
    FakeStream.seen = FakeEvent.seen = seen
    streams = [FakeStream()]

    @contextmanager
    def stream_of(stream: Any) -> Iterator[None]:
        streams.append(stream if stream is not None else streams[-1])
        try:
            yield
        finally:
            streams.pop()

    @contextmanager
    def no_device(*_: Any) -> Iterator[None]:
        yield

    def nothing() -> Any:
        """A function that does nothing: torch's compiler wants each function to be another object."""
        return lambda *_, **__: None

    def synchronize(*_: Any) -> None:
        seen.block("torch.cuda.synchronize", "waits for the device")

    cudart = SimpleNamespace(
        cudaHostRegister=seen.pinned.register,
        cudaHostUnregister=seen.pinned.unregister,
        cudaError=SimpleNamespace(success=0),
    )
    replaced: dict[str, Any] = {
        "_lazy_init": nothing(), "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing(), "device": no_device,
        "current_stream": lambda *_: streams[-1], "default_stream": lambda *_: streams[0],
        "Stream": FakeStream, "Event": FakeEvent, "stream": stream_of, "synchronize": synchronize,
        "get_device_capability": lambda *_: (9, 0), "cudart": lambda: cudart,
        "get_device_properties": lambda *_: SimpleNamespace(
            name="fake", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
        ),
        "is_current_stream_capturing": lambda: False, "empty_cache": nothing(),
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": nothing(), "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "manual_seed": lambda seed: torch.manual_seed(seed) and None,
        "manual_seed_all": lambda seed: torch.manual_seed(seed) and None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }  # fmt: skip
    for name, replacement in replaced.items():
        yield mock.patch.object(torch.cuda, name, replacement)
    yield mock.patch.object(torch.cuda.nvtx, "range_push", nothing())
    yield mock.patch.object(torch.cuda.nvtx, "range_pop", nothing())
