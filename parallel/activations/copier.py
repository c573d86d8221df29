"""Copies between the device and the host that run beside what the device computes.

Copies of one direction run in order; the two directions run beside each other. `CudaCopier` does it with a
stream a direction, `ThreadCopier` is its twin on the CPU, with a thread a direction.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor


class HostMemoryError(RuntimeError):
    """Host memory that is not to be had, or not page-locked."""


class Event(Protocol):
    """The end of a copy. Torch's events of CUDA are such."""

    def query(self) -> bool:
        """Whether the copy is done."""

    def synchronize(self) -> Any:
        """Wait until it is, on the host."""


class Copier(Protocol):
    """What the engine needs of a device."""

    device: torch.device

    def pin(self, memory: Tensor) -> None:
        """Make host memory fit for copies beside computation, until `close`; else `HostMemoryError`."""

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New memory on the device, for what is computed from now on."""

    def to_host(self, device: Tensor, host: Tensor) -> Event:
        """Start copying, after what has been computed until now.

        Keeping both tensors until the event is the caller's part: a copy does not do it.
        """

    def to_device(self, host: Tensor, device: Tensor) -> Event:
        """Likewise, the other way."""

    def make_host_copies_wait(self, event: Event) -> None:
        """Copies to the host that are started from now on come after the event."""

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        """What is computed from now on comes after the event, and may use the tensor that it stands for."""

    def close(self) -> None:
        """Finish all copies and give up what was pinned."""


class CudaCopier:
    """Copies on two streams of a GPU, ordered by events; the host waits for none of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._to_host_stream = torch.cuda.Stream(device)
        self._to_device_stream = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []

    def pin(self, memory: Tensor) -> None:
        # Not `pin_memory=True`: torch rounds what it allocates page-locked up to a power of two.
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            raise HostMemoryError(f"cudaHostRegister fails with error {code}")
        self._pinned.append(memory)

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=self.device)

    def to_host(self, device: Tensor, host: Tensor) -> Event:
        return self._copy(self._to_host_stream, device, host)

    def to_device(self, host: Tensor, device: Tensor) -> Event:
        return self._copy(self._to_device_stream, host, device)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> Event:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def make_host_copies_wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._to_host_stream.wait_event(event)

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        stream = torch.cuda.current_stream(self.device)
        assert isinstance(event, torch.cuda.Event)
        stream.wait_event(event)
        # Backward may run on another stream than the one that the memory was allocated on.
        tensor.record_stream(stream)

    def close(self) -> None:
        self._to_host_stream.synchronize()
        self._to_device_stream.synchronize()
        for memory in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._pinned.clear()


class ThreadCopier:
    """The twin of `CudaCopier` where the device is the CPU: the caller computes, so the caller is held."""

    def __init__(self, delay_s: Callable[[], float] = lambda: 0.0, timeout_s: float = 600.0) -> None:
        """
        Args:
            delay_s: called for every copy, gives the seconds that it takes longer.
            timeout_s: seconds after which who waits for a copy gets `TimeoutError`.
        """
        self.device = torch.device("cpu")
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        # They start their threads with the first copy: a process may be forked before.
        self._to_host_thread = ThreadPoolExecutor(1, "to-host")
        self._to_device_thread = ThreadPoolExecutor(1, "to-device")

    def pin(self, memory: Tensor) -> None:
        """Nothing to do: every thread can copy all memory."""

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype)

    def to_host(self, device: Tensor, host: Tensor) -> Event:
        return self._start(self._to_host_thread, device, host)

    def to_device(self, host: Tensor, device: Tensor) -> Event:
        return self._start(self._to_device_thread, host, device)

    def _start(self, thread: ThreadPoolExecutor, source: Tensor, target: Tensor) -> Event:
        return _ThreadEvent(thread.submit(self._copy, source, target, self._delay_s()), self._timeout_s)

    def _copy(self, source: Tensor, target: Tensor, delay_s: float) -> None:
        time.sleep(delay_s)
        target.copy_(source)

    def make_host_copies_wait(self, event: Event) -> None:
        self._to_host_thread.submit(event.synchronize)

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        event.synchronize()

    def close(self) -> None:
        self._to_host_thread.shutdown()
        self._to_device_thread.shutdown()


class _ThreadEvent:
    """The end of a copy in a thread; both methods raise what the copy raised."""

    def __init__(self, future: Future[None], timeout_s: float) -> None:
        self._future = future
        self._timeout_s = timeout_s

    def query(self) -> bool:
        return self._future.done() and self._future.result() is None

    def synchronize(self) -> None:
        self._future.result(self._timeout_s)
