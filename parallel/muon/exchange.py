"""Send matrices whole to their owners, and the owners' updates back to the shards.

Rounds are pipelined. While one is computed, the next one's pieces are in flight to their owners, and the
previous one's updates are in flight back to the shards; and if the shards' state rests in host memory, what
the next but one sends is on its way to the device, and what the previous one's updates are applied to.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.muon.plan import ExchangeRound, Matrix

ComputeUpdates = Callable[[Tensor], Tensor]
"""Maps matrices of one shape [B, rows, cols], which it may overwrite, to updates of that shape; float32."""


class Pieces(Protocol):
    """This rank's pieces of the matrices, asked for round by round; lists are numbers of matrices."""

    def load_directions(self, matrices: Sequence[int]) -> None:
        """Start loading what the directions of these pieces are made of; they are asked for next."""

    def directions(self, matrices: Sequence[int]) -> list[Tensor]:
        """What is sent of each piece: flat, float32, on the device."""

    def load_targets(self, matrices: Sequence[int]) -> None:
        """Start loading what the updates of these pieces are applied to; at most two rounds wait for it."""

    def apply(self, matrices: Sequence[int], updates: Sequence[Tensor]) -> None:
        """Apply the updates, flat, float32, on the device, of the round that has waited longest."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What one rank sends and receives in a round; sizes are numbers of elements."""

    held: list[int]
    """Matrices of which it has pieces, in order of their owners."""
    held_sizes: list[int]
    """Size of each of these pieces."""
    sent: list[int]
    """[rank] -> size of all pieces that it owns of this rank's."""
    owned: list[tuple[int, int, int]]
    """(matrix, start in it, size) of the pieces of this rank's own matrices, in order of holding ranks."""
    received: list[int]
    """[rank] -> size of all pieces that it holds of this rank's matrices."""


class MatrixExchange:
    """The exchange within a group of ranks for one list of matrices, which is the same on every rank."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        rounds: Sequence[ExchangeRound],
        group: dist.ProcessGroup,
        *,
        wire_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`wire_dtype` is the dtype in which pieces and updates travel, if the group has several ranks."""
        self._matrices = matrices
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._dtype = wire_dtype if self._num_ranks > 1 else torch.float32
        self._device = device
        self._owned = [each.owned[self._rank] for each in rounds]
        self._rounds = [self._plan(each) for each in rounds]

    @property
    def most_held(self) -> int:
        """The most elements that this rank has of the matrices of one round."""
        return max((sum(each.held_sizes) for each in self._rounds), default=0)

    def run(self, pieces: Pieces, compute: ComputeUpdates) -> None:
        """Compute the update of every matrix once, on its owner. Called by every rank of the group.

        Args:
            pieces: this rank's pieces.
            compute: called on owners, for the matrices of one shape together.
        """
        last = len(self._rounds) - 1
        if last < 0:
            return
        pieces.load_directions(self._rounds[0].held)
        arriving = self._send_to_owners(0, pieces)
        returning: _InFlight | None = None
        for number in range(last + 1):
            # 1. This round's pieces have arrived; the next round's leave.
            received = arriving.wait()
            if number < last:
                arriving = self._send_to_owners(number + 1, pieces)
            # 2. Compute this round, with communication in both directions and loads in flight.
            pieces.load_targets(self._rounds[number].held)
            updates = self._compute(number, received, compute)
            # 3. The previous round's updates are back; this round's leave.
            if returning is not None:
                self._apply(number - 1, returning.wait(), pieces)
            returning = self._send_back(number, updates)
        # 4. The last round's updates.
        assert returning is not None
        self._apply(last, returning.wait(), pieces)

    def _send_to_owners(self, number: int, pieces: Pieces) -> "_InFlight":
        """Start sending this rank's pieces of a round's matrices, and loading those of the next."""
        plan = self._rounds[number]
        flat = [part.to(self._dtype) for part in pieces.directions(plan.held)]
        in_flight = self._transfer(flat, plan.sent, plan.received)
        if number + 1 < len(self._rounds):
            pieces.load_directions(self._rounds[number + 1].held)
        return in_flight

    def _send_back(self, number: int, updates: dict[int, Tensor]) -> "_InFlight":
        """Start sending the updates of this rank's matrices to the ranks with pieces of them."""
        plan, parts = self._rounds[number], []
        for matrix, start, size in plan.owned:
            parts.append(updates[matrix].flatten()[start : start + size].to(self._dtype))
        return self._transfer(parts, plan.received, plan.sent)

    def _transfer(self, parts: list[Tensor], sent: list[int], received: list[int]) -> "_InFlight":
        """One all-to-all; `sent` and `received` are numbers of elements per rank."""
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        send = torch.cat(parts) if parts else empty
        # A rank alone is its own owner: nothing travels.
        if self._num_ranks == 1:
            return _InFlight(send, None)
        receive = torch.empty(sum(received), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(receive, send, received, sent, group=self._group, async_op=True)
        return _InFlight(receive, work, send)

    def _compute(self, number: int, received: Tensor, compute: ComputeUpdates) -> dict[int, Tensor]:
        """Number -> update of the matrices that this rank owns in a round; equal shapes form a batch."""
        # 1. Sort what was received by matrix.
        parts: dict[int, list[Tensor]] = defaultdict(list)
        position = 0
        for matrix, _, size in self._rounds[number].owned:
            parts[matrix].append(received[position : position + size])
            position += size
        # 2. Sort the matrices by shape.
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for matrix in self._owned[number]:
            batches[self._matrices[matrix].rows, self._matrices[matrix].cols].append(matrix)
        # 3. Join each matrix, and compute shape by shape.
        updates: dict[int, Tensor] = {}
        for (rows, cols), batch in batches.items():
            whole = torch.stack([torch.cat(parts[matrix]).view(rows, cols) for matrix in batch])
            updates |= dict(zip(batch, compute(whole.float()), strict=True))
        return updates

    def _apply(self, number: int, received: Tensor, pieces: Pieces) -> None:
        """Apply the updates of this rank's pieces in a round."""
        plan = self._rounds[number]
        pieces.apply(plan.held, [update.float() for update in received.split(plan.held_sizes)])

    def _plan(self, each: ExchangeRound) -> _Round:
        """This rank's part of a round."""
        held: list[int] = []
        held_sizes: list[int] = []
        sent: list[int] = []
        # 1. By owner, its matrices in its order; most ranks hold pieces of a few.
        for owned in each.owned:
            mine = [(matrix, size) for matrix in owned if (size := self._size_on(matrix, self._rank))]
            held += [matrix for matrix, _ in mine]
            held_sizes += [size for _, size in mine]
            sent.append(sum(size for _, size in mine))
        # 2. Of this rank's own.
        own = each.owned[self._rank]
        received = [sum(self._size_on(matrix, rank) for matrix in own) for rank in range(self._num_ranks)]
        return _Round(held, held_sizes, sent, list(self._owned_pieces(own)), received)

    def _owned_pieces(self, owned: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(matrix, start in it, size) of the pieces of this rank's matrices, in order of holding ranks."""
        # The order in which an all-to-all receives: by rank, then by matrix as each rank sends them.
        for holder in range(self._num_ranks):
            for matrix in owned:
                start = 0
                for rank, size in self._matrices[matrix].pieces:
                    if rank == holder:
                        yield matrix, start, size
                    start += size

    def _size_on(self, matrix: int, rank: int) -> int:
        return sum(size for holder, size in self._matrices[matrix].pieces if holder == rank)


class _InFlight:
    """Elements in flight."""

    def __init__(self, received: Tensor, work: Any, sent: Tensor | None = None) -> None:
        self._received = received
        self._work = work
        # Kept alive until it has been sent.
        self._sent = sent

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        self._sent = None
        return self._received
