"""Send matrices whole to their owners, and the owners' updates back to the shards.

Rounds are pipelined: while one is computed, the next one's pieces are in flight to their owners, and the
previous one's updates are in flight back to the shards.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.muon.plan import ExchangeRound, Matrix

ComputeUpdates = Callable[[Tensor], Tensor]
"""Maps matrices of one shape [B, rows, cols], which it may overwrite, to updates of that shape; float32."""
ApplyUpdate = Callable[[int, Tensor], None]
"""Called with a matrix's number and the update of this rank's piece of it: flat, float32, on the device."""


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
        self._rounds = rounds
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._dtype = wire_dtype if self._num_ranks > 1 else torch.float32
        self._device = device

    def run(self, pieces: Sequence[Tensor | None], compute: ComputeUpdates, apply: ApplyUpdate) -> None:
        """Compute the update of every matrix once, on its owner. Called by every rank of the group.

        Args:
            pieces: [number of the matrix] -> this rank's piece of it, flat float32; None if it has none.
            compute: called on owners, for the matrices of one shape together.
            apply: called for every piece of this rank.
        """
        arriving = self._send_to_owners(0, pieces) if self._rounds else None
        returning: _InFlight | None = None
        for number in range(len(self._rounds)):
            assert arriving is not None
            # 1. This round's pieces have arrived; the next round's leave.
            received = arriving.wait()
            arriving = self._send_to_owners(number + 1, pieces) if number + 1 < len(self._rounds) else None
            # 2. Compute this round, with communication in both directions in flight.
            updates = self._compute(number, received, compute)
            # 3. The previous round's updates are back; this round's leave.
            if returning is not None:
                self._apply(number - 1, returning.wait(), apply)
            returning = self._send_back(number, updates)
        # 4. The last round's updates.
        if returning is not None:
            self._apply(len(self._rounds) - 1, returning.wait(), apply)

    def _send_to_owners(self, number: int, pieces: Sequence[Tensor | None]) -> "_InFlight":
        """Start sending this rank's pieces of a round's matrices."""
        to_owners, sizes = self._held_pieces(number)
        parts = [pieces[matrix] for matrix, _ in to_owners]
        assert all(part is not None for part in parts), "the plan gives this rank a piece that it lacks"
        flat = [part.to(self._device, self._dtype, non_blocking=True) for part in parts if part is not None]
        return self._transfer(flat, sizes, self._sizes_of_owned(number))

    def _send_back(self, number: int, updates: dict[int, Tensor]) -> "_InFlight":
        """Start sending the updates of this rank's matrices to the ranks with pieces of them."""
        parts = []
        for matrix, start, size in self._owned_pieces(number):
            parts.append(updates[matrix].flatten()[start : start + size].to(self._dtype))
        _, held = self._held_pieces(number)
        return self._transfer(parts, self._sizes_of_owned(number), held)

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
        for matrix, _, size in self._owned_pieces(number):
            parts[matrix].append(received[position : position + size])
            position += size
        # 2. Sort the matrices by shape.
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for matrix in self._rounds[number].owned[self._rank]:
            batches[self._matrices[matrix].rows, self._matrices[matrix].cols].append(matrix)
        # 3. Join each matrix, and compute shape by shape.
        updates: dict[int, Tensor] = {}
        for (rows, cols), batch in batches.items():
            whole = torch.stack([torch.cat(parts[matrix]).view(rows, cols) for matrix in batch])
            updates |= dict(zip(batch, compute(whole.float()), strict=True))
        return updates

    def _apply(self, number: int, received: Tensor, apply: ApplyUpdate) -> None:
        """Apply the updates of this rank's pieces in a round."""
        position = 0
        for matrix, size in self._held_pieces(number)[0]:
            apply(matrix, received[position : position + size].float())
            position += size

    def _held_pieces(self, number: int) -> tuple[list[tuple[int, int]], list[int]]:
        """(matrix, size) of this rank's pieces, in order of owners, and the number of elements per owner."""
        pieces, sizes = [], []
        for owned in self._rounds[number].owned:
            # An owner's matrices in its order; most ranks hold pieces of a few.
            mine = [(matrix, size) for matrix in owned if (size := self._size_on(matrix, self._rank))]
            pieces += mine
            sizes.append(sum(size for _, size in mine))
        return pieces, sizes

    def _owned_pieces(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(matrix, start in it, size) of the pieces of this rank's matrices, in order of holding ranks."""
        owned = self._rounds[number].owned[self._rank]
        # The order in which an all-to-all receives: by rank, then by matrix as each rank sends them.
        for holder in range(self._num_ranks):
            for matrix in owned:
                start = 0
                for rank, size in self._matrices[matrix].pieces:
                    if rank == holder:
                        yield matrix, start, size
                    start += size

    def _sizes_of_owned(self, number: int) -> list[int]:
        """[rank] -> number of elements that it holds of this rank's matrices."""
        owned = self._rounds[number].owned[self._rank]
        return [sum(self._size_on(matrix, rank) for matrix in owned) for rank in range(self._num_ranks)]

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
