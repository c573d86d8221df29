"""Bring matrices whole to their owners, and the owners' results back to the shards.

Rounds are pipelined: while one is worked on, the next one's pieces are under way to their owners and the last
one's results on their way back.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.muon.plan import ExchangeRound, Matrix

Work = Callable[[Tensor], Tensor]
"""From matrices of one shape [B, rows, cols] to as many of the same shape, float32."""


class MatrixExchange:
    """The exchange of one group of ranks for one list of matrices, the same on every rank."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        rounds: Sequence[ExchangeRound],
        group: dist.ProcessGroup,
        *,
        wire_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`wire_dtype` is the format of pieces and results in a group of several ranks."""
        self._matrices = matrices
        self._rounds = rounds
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._dtype = wire_dtype if self._num_ranks > 1 else torch.float32
        self._device = device

    def run(self, pieces: Sequence[Tensor | None], work: Work, use: Callable[[int, Tensor], None]) -> None:
        """Work on every matrix once, by its owner. Called by every rank of the group.

        Args:
            pieces: [number of the matrix] -> this rank's piece, flat float32, None where it has none.
            work: called by owners.
            use: called with the number of a matrix and the result at this rank's piece of it, flat float32 on
                the device, for every piece.
        """
        arriving = self._send_to_owners(0, pieces) if self._rounds else None
        returning: _Transfer | None = None
        for number in range(len(self._rounds)):
            assert arriving is not None
            whole = arriving.wait()
            arriving = self._send_to_owners(number + 1, pieces) if number + 1 < len(self._rounds) else None
            results = self._work_on(number, whole, work)
            if returning is not None:
                self._use(number - 1, returning.wait(), use)
            returning = self._send_back(number, results)
        if returning is not None:
            self._use(len(self._rounds) - 1, returning.wait(), use)

    def _send_to_owners(self, number: int, pieces: Sequence[Tensor | None]) -> "_Transfer":
        to_owners, sizes = self._held_pieces(number)
        parts = [pieces[matrix] for matrix, _ in to_owners]
        assert all(part is not None for part in parts), "the plan gives this rank a piece that it lacks"
        flat = [part.to(self._device, self._dtype, non_blocking=True) for part in parts if part is not None]
        return self._transfer(flat, sizes, self._sizes_of_owned(number))

    def _send_back(self, number: int, results: dict[int, Tensor]) -> "_Transfer":
        parts = []
        for matrix, start, size in self._owned_pieces(number):
            parts.append(results[matrix].flatten()[start : start + size].to(self._dtype))
        _, held = self._held_pieces(number)
        return self._transfer(parts, self._sizes_of_owned(number), held)

    def _transfer(self, parts: list[Tensor], sent: list[int], received: list[int]) -> "_Transfer":
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        send = torch.cat(parts) if parts else empty
        if self._num_ranks == 1:
            return _Transfer(send, None)
        receive = torch.empty(sum(received), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(receive, send, received, sent, group=self._group, async_op=True)
        return _Transfer(receive, work, send)

    def _work_on(self, number: int, received: Tensor, work: Work) -> dict[int, Tensor]:
        """Results of the matrices that this rank owns, by number; worked on in batches of one shape."""
        parts: dict[int, list[Tensor]] = defaultdict(list)
        position = 0
        for matrix, _, size in self._owned_pieces(number):
            parts[matrix].append(received[position : position + size])
            position += size
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for matrix in self._rounds[number].owned[self._rank]:
            batches[self._matrices[matrix].rows, self._matrices[matrix].cols].append(matrix)
        results: dict[int, Tensor] = {}
        for (rows, cols), batch in batches.items():
            whole = torch.stack([torch.cat(parts[matrix]).view(rows, cols) for matrix in batch])
            results |= dict(zip(batch, work(whole.float()), strict=True))
        return results

    def _use(self, number: int, received: Tensor, use: Callable[[int, Tensor], None]) -> None:
        position = 0
        for matrix, size in self._held_pieces(number)[0]:
            use(matrix, received[position : position + size].float())
            position += size

    def _held_pieces(self, number: int) -> tuple[list[tuple[int, int]], list[int]]:
        """(matrix, size) of this rank's pieces by owner, and elements for each owner."""
        pieces, sizes = [], []
        for owned in self._rounds[number].owned:
            mine = [(matrix, size) for matrix in owned if (size := self._size_on(matrix, self._rank))]
            pieces += mine
            sizes.append(sum(size for _, size in mine))
        return pieces, sizes

    def _owned_pieces(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(matrix, start in it, size) of the pieces of this rank's matrices, by the rank that holds them."""
        owned = self._rounds[number].owned[self._rank]
        for holder in range(self._num_ranks):
            for matrix in owned:
                start = 0
                for rank, size in self._matrices[matrix].pieces:
                    if rank == holder:
                        yield matrix, start, size
                    start += size

    def _sizes_of_owned(self, number: int) -> list[int]:
        owned = self._rounds[number].owned[self._rank]
        return [sum(self._size_on(matrix, rank) for matrix in owned) for rank in range(self._num_ranks)]

    def _size_on(self, matrix: int, rank: int) -> int:
        return sum(size for holder, size in self._matrices[matrix].pieces if holder == rank)


class _Transfer:
    """Elements under way."""

    def __init__(self, received: Tensor, work: Any, sent: Tensor | None = None) -> None:
        self._received = received
        self._work = work
        # Kept alive until it has left.
        self._sent = sent

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        self._sent = None
        return self._received
