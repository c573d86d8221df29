"""Saved tensors in host memory from forward to backward.

```
 compute   │ forward 3        │ backward 1        │ forward 4        │ backward 2
 to host     tensors of 3 as they are saved         tensors of 4 …
 to device                      prefetch of 2 ─────────────────────►   loaded without waiting
```

A tensor's memory on the device is held until its copy in the host is whole, and only then let go. So a load
finds the tensor itself or a whole copy, never one that is being written: megatron-core's reload from within
backward does not order the two (NVIDIA/Megatron-LM issue 7398). The host never waits, but for budgets.

The engine is called by one thread at a time. Tickets can be dropped anywhere, even by the garbage collector
in the midst of a call: what was dropped is seen at the next call.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.activations.copier import Copier, Event
from parallel.activations.pool import Block, HostPool
from parallel.pipeline.schedule import PassKey
from parallel.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class NoOffload:
    """The figures of a rank that offloads nothing: none."""


@dataclass(slots=True)
class OffloadStats:
    """What the engine of one rank did since the last reading."""

    saved_bytes: int = 0
    """Copied to the host."""
    loaded_bytes: int = 0
    """Copied back; less than was saved if tensors were loaded before they had left."""
    peak_host_bytes: int = 0
    """The most host memory in use at a time, in whole blocks."""
    peak_device_bytes: int = 0
    """The most that the engine kept on the device at a time."""
    load_stall_s: float = 0.0
    """Computation waited for tensors on their way back."""
    save_stall_s: float = 0.0
    """The host waited for copies to let go of the device's memory."""


@dataclass(slots=True, eq=False)
class _OffloadedTensor:
    """A tensor that was saved."""

    key: PassKey
    block: Block
    host: Tensor
    """The block as a tensor of the same shape, strides and type."""
    device: Tensor | None
    """The tensor itself until its copy is whole, and longer if it is prefetched; or the one brought back."""
    version: int | None
    """Of the tensor as it was saved; None once it may be changed."""
    to_host: Event
    to_device: Event | None = None
    """The last copy back. There is none as long as `device` is the tensor itself."""
    is_in_host: bool = False
    """Whether the copy in the host is known to be whole."""
    is_prefetched: bool = False
    """Whether it was prefetched and has not been loaded since."""


class Ticket:
    """Stands for a saved tensor. Once it is dropped, all memory of the tensor is free."""

    __slots__ = ("_dropped", "_saved")

    def __init__(self, saved: _OffloadedTensor, dropped: deque[_OffloadedTensor]) -> None:
        self._saved = saved
        self._dropped = dropped

    def __del__(self) -> None:
        # No more than this: it may run within any call of the engine.
        self._dropped.append(self._saved)


class OffloadEngine:
    """Takes tensors to the host and brings them back, within a budget of each side."""

    def __init__(self, copier: Copier, host_bytes: int, device_bytes: int) -> None:
        """
        Args:
            host_bytes: host memory, all allocated now.
            device_bytes: the most that the engine keeps on the device between calls: tensors on their way to
                the host, and those prefetched. 0 is legal: every copy is then waited for.

        Raises `HostMemoryError` if the host does not have the memory or cannot page-lock it.
        """
        self._copier = copier
        self._pool = HostPool(host_bytes, copier.pin)
        self._max_device_bytes = device_bytes
        self._device_bytes = 0
        self._by_pass: dict[PassKey, list[_OffloadedTensor]] = {}
        self._leaving: deque[_OffloadedTensor] = deque()
        self._to_prefetch: deque[_OffloadedTensor] = deque()
        self._dropped: deque[_OffloadedTensor] = deque()
        self._stats = OffloadStats()
        self._stopwatch = Stopwatch(copier.device)

    @property
    def device(self) -> torch.device:
        """Where tensors come from."""
        return self._copier.device

    def save(self, tensor: Tensor, key: PassKey) -> Ticket:
        """Start a tensor's way to the host; its memory on the device is let go when it has arrived.

        Nothing waits, unless the engine would keep more than its budget on the device: then the host waits
        for tensors to arrive, oldest first. A tensor may not be changed before it has arrived; a later call
        raises `RuntimeError` if it was.

        Args:
            tensor: of any shape and type, on the copier's device. If its elements are not dense, what is kept
                is a contiguous copy.

        Raises `ValueError` for a tensor of another device, `HostBudgetError` if the host's budget is used up.
        """
        if tensor.device != self._copier.device:
            raise ValueError(f"a tensor on {tensor.device} cannot be offloaded from {self._copier.device}")
        self._poll()
        tensor = tensor.detach()
        if torch.empty_like(tensor, device="meta").stride() != tensor.stride():
            tensor = tensor.contiguous()
        block = self._pool.take(tensor.nbytes)
        flat = block.memory[: tensor.nbytes].view(tensor.dtype)
        host = flat.as_strided(tensor.shape, tensor.stride())
        to_host = self._copier.to_host(tensor, host)
        saved = _OffloadedTensor(key, block, host, tensor, tensor._version, to_host)
        self._device_bytes += saved.host.nbytes
        self._leaving.append(saved)
        self._by_pass.setdefault(key, []).append(saved)
        self._stats.saved_bytes += saved.host.nbytes
        self._make_room()
        return Ticket(saved, self._dropped)

    def prefetch(self, key: PassKey) -> None:
        """Bring a batch's tensors back, last saved first, as far as the device's budget has room.

        What it has no room for follows as others are loaded. Tensors that have not left stay.
        """
        self._poll()
        for saved in reversed(self._by_pass.get(key, ())):
            if not saved.is_prefetched:
                saved.is_prefetched = True
                self._to_prefetch.append(saved)
        self._start_prefetches()

    def load(self, ticket: Ticket) -> Tensor:
        """The tensor, for what is computed from now on: the one that was saved, or an equal one.

        It is the caller's: the engine keeps it no longer than it takes to leave. It can be loaded again.
        """
        self._poll()
        saved = ticket._saved
        tensor = saved.device
        if tensor is None:
            tensor = self._copy_back(saved)
        if saved.to_device is None:
            self._check_unchanged(saved)
            saved.version = None
        else:
            with self._stopwatch.timed("load_stall_s"):
                self._copier.make_compute_wait(saved.to_device, tensor)
        saved.is_prefetched = False
        self._drop_device_copy(saved)
        self._start_prefetches()
        return tensor

    def read_stats(self) -> OffloadStats:
        """What was done since the last reading; waits for the device."""
        self._poll()
        self._stopwatch.read_into(self._stats)
        self._stats.peak_host_bytes = self._pool.peak_bytes
        stats, self._stats = self._stats, OffloadStats(peak_device_bytes=self._device_bytes)
        self._pool.restart_peak()
        return stats

    def check_empty(self) -> None:
        """Wait for what is under way; `RuntimeError` if a ticket is held, as none is after a step."""
        while self._leaving:
            self._leaving[0].to_host.synchronize()
            self._poll()
        self._poll()
        if self._by_pass:
            held = ", ".join(
                f"{len(saved)} of chunk {key.vp_stage}, micro-batch {key.micro_batch}"
                for key, saved in list(self._by_pass.items())[:8]
            )
            raise RuntimeError(
                f"offloaded tensors are held after the step ({self._pool.held_bytes} bytes in the host): "
                f"{held}: drop what holds their graphs"
            )

    def close(self) -> None:
        """Finish all copies and give the host's memory up; tickets are worth nothing afterwards."""
        self._copier.close()

    def _poll(self) -> None:
        """See what has been dropped and what has arrived.

        What is wanted follows at the next prefetch or load: saving may happen beside a communication, for
        whose end a copy would wait.
        """
        while self._dropped:
            self._free(self._dropped.popleft())
        while self._leaving and self._leaving[0].to_host.query():
            saved = self._leaving.popleft()
            saved.is_in_host = True
            self._check_unchanged(saved)
            self._drop_device_copy(saved)

    def _free(self, saved: _OffloadedTensor) -> None:
        of_pass = self._by_pass[saved.key]
        of_pass.remove(saved)
        if not of_pass:
            del self._by_pass[saved.key]
        saved.is_prefetched, saved.version = False, None
        if saved.to_device is not None:
            # The block's next owner may save from another stream than the one that waited for this copy.
            self._copier.make_host_copies_wait(saved.to_device)
            if saved.device is not None:
                self._copier.make_compute_wait(saved.to_device, saved.device)
        self._drop_device_copy(saved)
        self._pool.give(saved.block)

    def _drop_device_copy(self, saved: _OffloadedTensor) -> None:
        """Let go of the device's memory, if nothing is in the way."""
        if saved.device is not None and saved.is_in_host and not saved.is_prefetched:
            saved.device = None
            self._device_bytes -= saved.host.nbytes

    def _make_room(self) -> None:
        """Wait for tensors to arrive in the host until the device's budget is kept."""
        started = time.perf_counter()
        while self._device_bytes > self._max_device_bytes and self._leaving:
            self._leaving[0].to_host.synchronize()
            self._poll()
        self._stats.save_stall_s += time.perf_counter() - started
        self._note_peak()

    def _start_prefetches(self) -> None:
        """Start to bring back what was prefetched, in order, as far as there is room."""
        while self._to_prefetch:
            saved = self._to_prefetch[0]
            if saved.is_prefetched and saved.device is None:
                if self._device_bytes + saved.host.nbytes > self._max_device_bytes:
                    return
                saved.device = self._copy_back(saved)
                self._device_bytes += saved.host.nbytes
                self._note_peak()
            self._to_prefetch.popleft()

    def _copy_back(self, saved: _OffloadedTensor) -> Tensor:
        tensor = self._copier.empty(saved.host.shape, saved.host.stride(), saved.host.dtype)
        saved.to_device = self._copier.to_device(saved.host, tensor)
        self._stats.loaded_bytes += saved.host.nbytes
        return tensor

    def _note_peak(self) -> None:
        self._stats.peak_device_bytes = max(self._stats.peak_device_bytes, self._device_bytes)

    def _check_unchanged(self, saved: _OffloadedTensor) -> None:
        if saved.device is not None and saved.version not in (None, saved.device._version):
            raise RuntimeError(
                f"a tensor of shape {tuple(saved.host.shape)} of chunk {saved.key.vp_stage}, micro-batch "
                f"{saved.key.micro_batch} was changed in place while it was on its way to the host: "
                "its copy may hold either value; do not offload it"
            )
