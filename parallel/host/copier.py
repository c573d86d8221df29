"""Copies between the device and the host that run concurrently with computation on the device.

Copies in one direction run in order; the two directions run concurrently. `CudaCopier` has a stream per
direction; `ThreadCopier` is its twin on the CPU, with a thread per direction.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.host.memory import HostMemoryError


class Event(Protocol):
    """The end of a copy; `torch.cuda.Event` fits."""

    def query(self) -> bool:
        """Whether the copy is complete."""

    def synchronize(self) -> Any:
        """Make the host wait until the copy is complete."""


class Copier(Protocol):
    """What the offload engine needs of a device."""

    device: torch.device

    def pin(self, memory: Tensor) -> None:
        """Page-lock host memory until `close`, so that copies can be asynchronous; else `HostMemoryError`."""

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New memory on the device, for computation queued from now on."""

    def to_host(self, device: Tensor, host: Tensor) -> Event:
        """Start a copy that runs after the computation queued so far.

        The caller keeps both tensors alive until the event: the copy does not.
        """

    def to_device(self, host: Tensor, device: Tensor) -> Event:
        """Start a copy in the other direction, under the same conditions."""

    def make_host_copies_wait(self, event: Event) -> None:
        """Make copies to the host that are started from now on wait for the event."""

    def make_device_copies_wait(self, event: Event) -> None:
        """Make copies to the device that are started from now on wait for the event."""

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        """Make computation queued from now on wait for the event; it may then use the copied `tensor`."""

    def close(self) -> None:
        """Finish all copies and unpin all memory."""


class CudaCopier:
    """Copies on two streams of a GPU, ordered by events; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._to_host_stream = torch.cuda.Stream(device)
        self._to_device_stream = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []

    def pin(self, memory: Tensor) -> None:
        # Not `pin_memory=True`: torch rounds page-locked allocations up to a power of two.
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
        # What has been computed so far comes first: the source, or the last use of the target's memory.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def make_host_copies_wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._to_host_stream.wait_event(event)

    def make_device_copies_wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._to_device_stream.wait_event(event)

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
    """The twin of `CudaCopier` on the CPU, where computation waits by making the caller wait."""

    def __init__(self, delay_s: Callable[[], float] = lambda: 0.0, timeout_s: float = 600.0) -> None:
        """
        Args:
            delay_s: called for every copy; returns seconds by which to delay it.
            timeout_s: seconds after which waiting for a copy raises `TimeoutError`.
        """
        self.device = torch.device("cpu")
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        # Threads are started by the first copy: the process may be forked before.
        self._to_host_thread = ThreadPoolExecutor(1, "to-host")
        self._to_device_thread = ThreadPoolExecutor(1, "to-device")

    def pin(self, memory: Tensor) -> None:
        """Nothing to do: threads can copy any memory."""

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
        # Tasks of the thread run in order: this one makes later copies wait, not the caller.
        self._to_host_thread.submit(event.synchronize)

    def make_device_copies_wait(self, event: Event) -> None:
        self._to_device_thread.submit(event.synchronize)

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        # The caller computes.
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


def copier_of(device: torch.device) -> Copier:
    """What copies from and to a device."""
    return CudaCopier(device) if device.type == "cuda" else ThreadCopier()
