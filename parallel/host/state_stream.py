"""State that rests in host memory and passes through the device, one load after another.

```
 to device   │ load n+1 │ load n+2 │ …            a copy stream per direction
 compute     │ n        │ n+1      │ n+2          waits for its load
 to host     │ write n-1│ write n  │ …            into the host memory that it came from
```

A lane has two buffers on the device: one is computed with while the other is written back or loaded. Events
order the three; the host never waits, and nothing is allocated from one load to the next.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from parallel.host.copier import Copier, Event

_NUM_BUFFERS = 2


class Loaded(Protocol):
    """Pieces of state on the device."""

    def tensors(self) -> list[Tensor]:
        """The pieces, flat float32, in the order of the load. What is computed from now on waits for them."""

    def write_back(self) -> None:
        """Keep what has been computed into them. They are not to be changed afterwards."""


class Lane(Protocol):
    """A succession of loads. At most two are open: a load must be written back before the next but one."""

    def load(self, pieces: Sequence[Tensor]) -> Loaded:
        """Start bringing pieces of state (flat, float32) to the device."""

    def close(self) -> None:
        """Free the buffers, once every load has been written back."""


class ResidentPieces:
    """Pieces that are on the device already."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self._pieces = list(pieces)

    def tensors(self) -> list[Tensor]:
        """The pieces of state themselves."""
        return self._pieces

    def write_back(self) -> None:
        """Nothing: they were changed in place."""


class ResidentLane:
    """A lane of state that is on the device: nothing moves."""

    def load(self, pieces: Sequence[Tensor]) -> ResidentPieces:
        """The pieces themselves."""
        return ResidentPieces(pieces)

    def close(self) -> None:
        """Nothing."""


class StateStream:
    """Lanes between the state of a rank in page-locked host memory and its device."""

    def __init__(self, copier: Copier) -> None:
        self.copier = copier
        self._last_write: Event | None = None

    def lane(self, num_elements: int) -> "StreamedLane":
        """A lane with buffers for so many elements per load."""
        return StreamedLane(self, num_elements)

    def written(self, event: Event) -> None:
        """Remember the copy to the host that was started last; copies in a direction end in order."""
        self._last_write = event

    def settle(self) -> None:
        """Make the host wait until all state is back, before it reads or changes any."""
        if self._last_write is not None:
            self._last_write.synchronize()
            self._last_write = None


class StreamedLane:
    """A lane through two buffers on the device, used in turn."""

    def __init__(self, stream: StateStream, num_elements: int) -> None:
        self._stream, self._copier = stream, stream.copier
        self._buffers = [
            self._copier.empty((num_elements,), (1,), torch.float32) for _ in range(_NUM_BUFFERS)
        ]
        self._written: list[Event | None] = [None] * _NUM_BUFFERS
        self._is_open = [False] * _NUM_BUFFERS
        self._turn = 0

    def load(self, pieces: Sequence[Tensor]) -> "StreamedPieces":
        """Start copying pieces to the device, when the buffer's previous content is back in the host."""
        # 1. The buffer whose turn it is; the copies wait for the one that empties it.
        turn, self._turn = self._turn, (self._turn + 1) % _NUM_BUFFERS
        assert not self._is_open[turn], "a load is still to be written back"
        self._is_open[turn] = True
        if (written := self._written[turn]) is not None:
            self._copier.make_device_copies_wait(written)
        # 2. One copy per piece, next to each other.
        sizes = [piece.numel() for piece in pieces]
        parts = list(self._buffers[turn][: sum(sizes)].split(sizes)) if pieces else []
        arrived = None
        for piece, part in zip(pieces, parts, strict=True):
            arrived = self._copier.to_device(piece, part)
        return StreamedPieces(self, turn, list(pieces), parts, arrived)

    def take_back(self, turn: int, parts: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        """Start copying parts of a buffer to the pieces that they are of."""
        for piece, part in zip(pieces, parts, strict=True):
            self._written[turn] = self._copier.to_host(part, piece)
        self._is_open[turn] = False
        if (written := self._written[turn]) is not None:
            self._stream.written(written)

    def close(self) -> None:
        """Let what is computed from now on wait for the last copies: it may get the buffers' memory, and the
        next lane's loads, which come after it, may read what the copies write."""
        assert not any(self._is_open), "a load is still to be written back"
        for buffer, written in zip(self._buffers, self._written, strict=True):
            if written is not None:
                self._copier.make_compute_wait(written, buffer)
        self._buffers.clear()


class StreamedPieces:
    """Pieces in a lane's buffer."""

    def __init__(
        self,
        lane: StreamedLane,
        turn: int,
        pieces: list[Tensor],
        parts: list[Tensor],
        arrived: Event | None,
    ) -> None:
        self._lane, self._turn, self._pieces, self._parts = lane, turn, pieces, parts
        self._arrived = arrived

    def tensors(self) -> list[Tensor]:
        """The parts of the buffer that hold them."""
        if self._arrived is not None:
            self._lane._copier.make_compute_wait(self._arrived, self._parts[-1])
        return self._parts

    def write_back(self) -> None:
        """Start copying them to where they came from."""
        self._lane.take_back(self._turn, self._parts, self._pieces)
        self._parts = []
