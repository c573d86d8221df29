"""The state of one moment in host memory: what a save writes while training goes on.

```
 compute    │ update n │ forward n+1 │ backward n+1 │ update n+1 …   waits for the copies, long ended
 copy       │          │ state n to the host          │              on a stream of its own
 threads    │                        │ look at it, hash it, write it …
```

Weights, masters and moments change in an update alone, so that copies have the passes of a step to run in.
Buffers change at the end of the passes (the routers' biases); they are small, and copied first. The host
waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k25_train.checkpoint.files.parts import Part
from k25_train.errors import CheckpointError
from k25_train.units import GB
from parallel.host.copier import Copier, Event, ThreadCopier, copier_of
from parallel.host.memory import HostMemoryError, map_pages

if TYPE_CHECKING:
    from k25_train.checkpoint.pieces import Piece

_ALIGNMENT = 64
"""Bytes at whose multiples pieces begin: more than any element has, and a cache line."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """The last copy of a copier."""

    copier: Copier
    event: Event
    source: Tensor


@dataclass(frozen=True, slots=True)
class Copied:
    """Pieces of the state as they were at one moment, once they have been copied."""

    parts: Sequence[tuple[Part, Tensor]]
    """Each part with its elements [n] in host memory."""
    events: Sequence[Event]
    """The ends of the copies."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return sum(part.num_bytes for part, _ in self.parts)

    def wait(self) -> None:
        """Make the calling thread wait until the copies are complete; before that nothing may be read."""
        for event in self.events:
            event.synchronize()


class Snapshot:
    """One region of host memory with room for this rank's pieces, made once and used by every save."""

    def __init__(self, copier: Copier, host_copier: Copier) -> None:
        """
        Args:
            copier: copies what is on the device of the run.
            host_copier: copies what is in host memory, in a thread.
        """
        self._copier, self._host_copier = copier, host_copier
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._running: list[_Copy] = []

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        return self._arena.numel()

    def take(self, pieces: Sequence["Piece"]) -> Copied:
        """Start to copy pieces; nothing may read what an earlier call returned any more.

        The host does not wait, but for its memory, which the first call takes. Raises `CheckpointError` if
        there is not enough.
        """
        # 1. Where each piece goes.
        offsets, needed = places([piece.part for piece in pieces])
        if not self.num_bytes:
            self._arena = self._lock(needed)
        assert needed == self.num_bytes, "the pieces of a run do not change"
        copies = [
            (piece.part, _as_elements(self._arena, offset, piece.part))
            for piece, offset in zip(pieces, offsets, strict=True)
        ]
        # 2. Copies run in order: what changes first comes first, and the passes wait for that.
        order = sorted(range(len(pieces)), key=lambda number: not pieces[number].is_buffer)
        last: dict[int, _Copy] = {}
        for number in order:
            source, (_, target) = pieces[number].tensor, copies[number]
            copier = self._host_copier if source.device.type == "cpu" else self._copier
            event = copier.to_host(source, target)
            last[id(copier)] = _Copy(copier, event, source)
            if pieces[number].is_buffer:
                copier.make_compute_wait(event, source)
        self._running = list(last.values())
        return Copied(copies, [copy.event for copy in self._running])

    def wait_to_update(self) -> bool:
        """Let the update that comes next wait for the copies; the host waits for those of its own memory.

        Returns whether there were any.
        """
        running, self._running = self._running, []
        for copy in running:
            copy.copier.make_compute_wait(copy.event, copy.source)
        return bool(running)

    def close(self) -> None:
        """Free the memory, once all copies have ended."""
        for copier in {id(each): each for each in (self._copier, self._host_copier)}.values():
            copier.close()
        self._arena = torch.empty(0, dtype=torch.uint8)

    def _lock(self, num_bytes: int) -> Tensor:
        try:
            region = map_pages(num_bytes)
            if num_bytes:
                self._copier.pin(region)
        except HostMemoryError as error:
            raise CheckpointError(
                f"the host has no {num_bytes / GB:.3g} GB of memory for this rank's copy of its state "
                f"({error}): raise the limit of locked memory (ulimit -l), or use more nodes, each of whose "
                "ranks has less"
            ) from error
        return region


def places(parts: Sequence[Part]) -> tuple[list[int], int]:
    """First byte of each part in a snapshot, and the bytes of all."""
    offsets, needed = [], 0
    for part in parts:
        offsets.append(needed)
        needed += -(-part.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, needed


def build_snapshot(device: torch.device) -> Snapshot:
    """A snapshot of state on a device, and in host memory; it takes no memory yet."""
    copier = copier_of(device)
    return Snapshot(copier, copier if isinstance(copier, ThreadCopier) else ThreadCopier())


def _as_elements(arena: Tensor, offset: int, part: Part) -> Tensor:
    return arena[offset : offset + part.num_bytes].view(part.dtype)
