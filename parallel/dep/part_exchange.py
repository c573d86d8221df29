"""Parts of items: what the ranks that encode one item together hand to each other in every layer.

Each rank has the queries of its own rows, and needs the keys and values of all. The ranks of an item send
theirs to one another; in the backward pass they send back what the others' keys and values have got of
gradients, and each adds up what comes for its own. Who takes part is read from the plan, which also has all
ranks take split items in one order (its invariant 5), so that no message is waited for that is not under way.
No process group is made: messages pass between pairs of ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.dep.grid import Grid
from parallel.dep.plan import VisionPlan


class PartExchange:
    """This rank's end of it."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        phase: Callable[[str, Sequence[int]], AbstractContextManager[object]],
    ) -> None:
        """
        Args:
            group: all ranks of the job, for nothing else than vision.
            phase: announces what this rank waits for, and the global ranks that it waits for.
        """
        self._group = group
        self.rank = dist.get_rank()
        self._phase = phase
        self.sent_bytes = 0
        """What this rank has sent to others so far."""

    def part_in(self, plan: VisionPlan, chunk: int) -> "PartOfItem | None":
        """The part of a split item that this rank's chunk is; None if it is made of whole items."""
        part = plan.parts[plan.chunks[self.rank][chunk][0]]
        parts = plan.parts_of(part.item)
        if len(parts) == 1:
            return None
        return PartOfItem(
            row=part.row,
            num_rows=part.num_rows,
            place=parts.index(part),
            ranks=tuple(each.rank for each in parts),
            sizes=tuple(each.num_patches for each in parts),
            exchange=self,
        )

    def swap(self, ranks: Sequence[int], outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Send a tensor to each of these ranks but oneself, and fill one from each. Called by all of them.

        Args:
            ranks: global ranks, in the same order on all of them.
            outgoing: [place of the receiver among them] -> contiguous.
            incoming: [place of the sender] -> contiguous, is overwritten.
        """
        operations = []
        for rank, to_send, to_fill in zip(ranks, outgoing, incoming, strict=True):
            if rank != self.rank:
                self.sent_bytes += to_send.nbytes
                operations.append(dist.P2POp(dist.isend, to_send, rank, self._group))
                operations.append(dist.P2POp(dist.irecv, to_fill, rank, self._group))
        with self._phase("keys and values", ranks):
            for work in dist.batch_isend_irecv(operations):
                work.wait()


@dataclass(frozen=True, slots=True)
class PartOfItem:
    """What the encoder has to know of a chunk that is a part of an item."""

    row: int
    """First row of patches."""
    num_rows: int
    """Rows of patches."""
    place: int
    """Which of the item's parts it is."""
    ranks: tuple[int, ...]
    """[part of the item] -> global rank that encodes it."""
    sizes: tuple[int, ...]
    """[part of the item] -> its patches."""
    exchange: PartExchange

    def gather(self, own: Tensor) -> Tensor:
        """[p, ...] of this part's patches -> [P, ...] of all the item's, part after part.

        Called by all ranks of the item, and so is the backward pass, if there is one.
        """
        return _Gather.apply(own, self)


class PartEncoder(Protocol):
    """An encoder that can also encode a part: patches [p, 3*p*p] of its rows, and the whole item's grid."""

    def __call__(self, pixels: Tensor, grid_thw: tuple[Grid, ...], part: PartOfItem | None = None) -> Tensor:
        """Features [V, D] of the items, or of the part."""


class _Gather(torch.autograd.Function):
    """Puts the blocks of all parts together; their gradients go back to their ranks and are added up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, part: PartOfItem) -> Tensor:
        ctx.part = part
        own = own.contiguous()
        gathered = own.new_empty(sum(part.sizes), *own.shape[1:])
        blocks = gathered.split(part.sizes)
        blocks[part.place].copy_(own)
        part.exchange.swap(part.ranks, [own] * len(blocks), blocks)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        part: PartOfItem = ctx.part
        blocks = gradient.contiguous().split(part.sizes)
        own = blocks[part.place]
        received = own.new_empty(len(blocks), *own.shape)
        received[part.place] = own
        part.exchange.swap(part.ranks, blocks, received.unbind())
        # One sum over all, since that of low-precision numbers is rounded once, and in the order of parts.
        return received.sum(dim=0), None
