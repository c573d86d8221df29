"""Offloading: saved tensors are in host memory between forward and backward.

```
 compute   │ forward 3        │ backward 1        │ forward 4        │ backward 2
 to host     tensors of 3 as they are saved         tensors of 4 …
 to device                      prefetch of 2 ─────────────────────►   loaded without waiting
```

A tensor's device memory is held until its copy in the host is complete, and only then released. So a load
finds either the tensor itself or a complete copy, never one that is being written: megatron-core's reload
from within backward does not order the two (NVIDIA/Megatron-LM issue 7398). The host waits only for budgets.

The engine is called by one thread at a time. Tickets can be dropped anywhere, even by the garbage collector
in the middle of a call: the next call handles what was dropped.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.activations.pool import HostPool
from parallel.activations.ticket import OffloadedTensor, Ticket
from parallel.host.copier import Copier
from parallel.pipeline.schedule import PassKey
from parallel.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class NoOffload:
    """The figures of a rank that offloads nothing: none."""


@dataclass(slots=True)
class OffloadStats:
    """What one rank's engine did since the last reading."""

    saved_bytes: int = 0
    """Bytes copied to the host."""
    loaded_bytes: int = 0
    """Bytes copied back; fewer than were saved if tensors were loaded before they had left the device."""
    peak_host_bytes: int = 0
    """Peak of host memory in use, in whole blocks."""
    peak_device_bytes: int = 0
    """Peak of device memory held by the engine."""
    load_stall_s: float = 0.0
    """Seconds that computation waited for copies to the device."""
    save_stall_s: float = 0.0
    """Seconds that the host waited for copies to the host, to keep the device budget."""


class OffloadEngine:
    """Copies tensors to the host and back, within a budget of memory on each side."""

    def __init__(self, copier: Copier, host_bytes: int, device_bytes: int) -> None:
        """
        Args:
            host_bytes: host memory, allocated immediately.
            device_bytes: device memory that the engine may hold between calls, for tensors in flight to the
                host and prefetched ones. 0 is legal: the host then waits for every copy.

        Raises `HostMemoryError` if the host does not have the memory or cannot page-lock it.
        """
        self._copier = copier
        self._pool = HostPool(host_bytes, copier.pin)
        self._max_device_bytes = device_bytes
        self._device_bytes = 0
        self._by_pass: dict[PassKey, list[OffloadedTensor]] = {}
        self._leaving: deque[OffloadedTensor] = deque()
        self._to_prefetch: deque[OffloadedTensor] = deque()
        self._dropped: deque[OffloadedTensor] = deque()
        self._stats = OffloadStats()
        self._stopwatch = Stopwatch(copier.device)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self._copier.device

    def save(self, tensor: Tensor, key: PassKey) -> Ticket:
        """Start copying a tensor to the host; its device memory is released when the copy is complete.

        Nothing waits unless the engine would exceed its device budget: the host then waits for copies to
        complete, oldest first. A tensor must not be changed before its copy is complete; a later call raises
        `RuntimeError` if it was.

        Args:
            tensor: any shape and dtype, on the copier's device. If its elements are not dense, a contiguous
                copy is saved.
            key: the pass that saves it, which `prefetch` will name.

        Raises `ValueError` for a tensor on another device, `HostBudgetError` if the host budget is used up.
        """
        if tensor.device != self._copier.device:
            raise ValueError(f"a tensor on {tensor.device} cannot be offloaded from {self._copier.device}")
        # 1. Its layout in the host is its own, if that is dense.
        self._poll()
        tensor = tensor.detach()
        if torch.empty_like(tensor, device="meta").stride() != tensor.stride():
            tensor = tensor.contiguous()
        # 2. Start the copy into a block of the pool.
        block = self._pool.take(tensor.nbytes)
        flat = block.memory[: tensor.nbytes].view(tensor.dtype)
        host = flat.as_strided(tensor.shape, tensor.stride())
        to_host = self._copier.to_host(tensor, host)
        saved = OffloadedTensor(key, block, host, tensor, tensor._version, to_host)
        # 3. Its device memory counts until the copy is complete.
        self._device_bytes += saved.host.nbytes
        self._leaving.append(saved)
        self._by_pass.setdefault(key, []).append(saved)
        self._stats.saved_bytes += saved.host.nbytes
        self._make_room()
        return Ticket(saved, self._dropped)

    def prefetch(self, key: PassKey) -> None:
        """Start copying a pass's tensors back, last saved first, as far as the device budget has room.

        The rest follows as tensors are loaded. Tensors that have not left the device stay there.
        """
        self._poll()
        for saved in reversed(self._by_pass.get(key, ())):
            if not saved.is_prefetched:
                saved.is_prefetched = True
                self._to_prefetch.append(saved)
        self._start_prefetches()

    def load(self, ticket: Ticket) -> Tensor:
        """The tensor, for computation queued from now on: the one that was saved, or an equal one.

        The caller owns it: the engine holds it no longer than its copy to the host takes. It can be loaded
        again.
        """
        # 1. What is not on the device is copied back now: it was not prefetched, or had no room.
        self._poll()
        saved = ticket.saved
        tensor = saved.device
        if tensor is None:
            tensor = self._copy_back(saved)
        # 2. The tensor itself must be unchanged; a copy must be complete before computation reads it.
        if saved.to_device is None:
            self._check_unchanged(saved)
            saved.version = None
        else:
            with self._stopwatch.timed("load_stall_s"):
                self._copier.make_compute_wait(saved.to_device, tensor)
        # 3. Its device memory is the caller's from here on, which makes room for the next prefetch.
        saved.is_prefetched = False
        self._drop_device_copy(saved)
        self._start_prefetches()
        return tensor

    def read_stats(self) -> OffloadStats:
        """Statistics since the last reading; waits for the device."""
        self._poll()
        self._stopwatch.read_into(self._stats)
        self._stats.peak_host_bytes = self._pool.peak_bytes
        stats, self._stats = self._stats, OffloadStats(peak_device_bytes=self._device_bytes)
        self._pool.restart_peak()
        return stats

    def check_empty(self) -> None:
        """Wait for copies in flight; `RuntimeError` if a ticket is held, as none should be after a step."""
        # 1. Complete all copies to the host.
        while self._leaving:
            self._leaving[0].to_host.synchronize()
            self._poll()
        self._poll()
        # 2. Name the passes whose tensors are still held.
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
        """Finish all copies and release the host memory; tickets are invalid afterwards."""
        self._copier.close()

    def _poll(self) -> None:
        """Handle dropped tickets and completed copies to the host.

        Prefetches are started only by `prefetch` and `load`: saving may run concurrently with communication,
        whose end a copy back would wait for.
        """
        # 1. Tickets dropped since the last call, whose copies may still be in flight.
        while self._dropped:
            self._free(self._dropped.popleft())
        # 2. Copies to the host complete in order.
        while self._leaving and self._leaving[0].to_host.query():
            saved = self._leaving.popleft()
            saved.is_in_host = True
            self._check_unchanged(saved)
            self._drop_device_copy(saved)

    def _free(self, saved: OffloadedTensor) -> None:
        """Free all memory of a tensor whose ticket was dropped."""
        # 1. Forget it.
        of_pass = self._by_pass[saved.key]
        of_pass.remove(saved)
        if not of_pass:
            del self._by_pass[saved.key]
        # 2. Order a copy back before the next use of its memory on both sides.
        saved.is_prefetched, saved.version = False, None
        if saved.to_device is not None:
            # The block's next owner may save from a stream other than the one that waited for this copy.
            self._copier.make_host_copies_wait(saved.to_device)
            if saved.device is not None:
                self._copier.make_compute_wait(saved.to_device, saved.device)
        # 3. Device memory follows when its copy to the host completes, if that is still in flight.
        self._drop_device_copy(saved)
        self._pool.give(saved.block)

    def _drop_device_copy(self, saved: OffloadedTensor) -> None:
        """Release the device memory, unless the copy is incomplete or the tensor is prefetched."""
        if saved.device is not None and saved.is_in_host and not saved.is_prefetched:
            saved.device = None
            self._device_bytes -= saved.host.nbytes

    def _make_room(self) -> None:
        """Wait for copies to the host until the device budget is kept."""
        started = time.perf_counter()
        while self._device_bytes > self._max_device_bytes and self._leaving:
            self._leaving[0].to_host.synchronize()
            self._poll()
        self._stats.save_stall_s += time.perf_counter() - started
        self._note_peak()

    def _start_prefetches(self) -> None:
        """Start requested prefetches, in order, as far as the device budget has room."""
        while self._to_prefetch:
            saved = self._to_prefetch[0]
            # Others have been loaded or dropped since, or have not left the device.
            if saved.is_prefetched and saved.device is None:
                if self._device_bytes + saved.host.nbytes > self._max_device_bytes:
                    return
                saved.device = self._copy_back(saved)
                self._device_bytes += saved.host.nbytes
                self._note_peak()
            self._to_prefetch.popleft()

    def _copy_back(self, saved: OffloadedTensor) -> Tensor:
        """Start copying a tensor back, into new memory on the device."""
        tensor = self._copier.empty(saved.host.shape, saved.host.stride(), saved.host.dtype)
        saved.to_device = self._copier.to_device(saved.host, tensor)
        self._stats.loaded_bytes += saved.host.nbytes
        return tensor

    def _note_peak(self) -> None:
        self._stats.peak_device_bytes = max(self._stats.peak_device_bytes, self._device_bytes)

    def _check_unchanged(self, saved: OffloadedTensor) -> None:
        """RuntimeError if the tensor itself was changed before its copy was complete."""
        if saved.device is not None and saved.version not in (None, saved.device._version):
            raise RuntimeError(
                f"a tensor of shape {tuple(saved.host.shape)} of chunk {saved.key.vp_stage}, micro-batch "
                f"{saved.key.micro_batch} was changed in place while it was copied to the host: "
                "the copy may hold either value; do not offload it"
            )
