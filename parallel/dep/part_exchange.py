"""Parts of split items: what the ranks that encode one item together exchange in every layer.

Each rank computes the queries of its rows, and needs the keys and values of all rows. The ranks of an item
send theirs to one another; in the backward pass they send back the gradients of the others' keys and values,
and each sums those that it receives for its own. Who takes part is read from the plan, which also has all
ranks take split items in one order (its invariant 5): no rank waits for a message whose sender waits for it
in turn. No process group is created: messages pass between pairs of ranks.
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
from parallel.dep.plan_share import PlanShare


class PartExchange:
    """This rank's end of the exchange."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        phase: Callable[[str, Sequence[int]], AbstractContextManager[object]],
    ) -> None:
        """
        Args:
            group: all ranks of the job; used for this exchange only.
            phase: announces what this rank waits for, and the global ranks that it waits for.
        """
        self._group = group
        self.rank = dist.get_rank()
        self._phase = phase
        self.sent_bytes = 0
        """Bytes that this rank has sent to others since it was created."""

    def part_in(self, plan: VisionPlan | PlanShare, chunk: int) -> "PartOfItem | None":
        """The part of a split item that this rank's chunk is; None if it is made of whole items."""
        part = plan.parts[plan.chunks[self.rank][chunk][0]]
        parts = plan.parts_of(part.item)
        if len(parts) == 1:
            return None
        return PartOfItem(
            row=part.row,
            num_rows=part.num_rows,
            index=parts.index(part),
            ranks=tuple(each.rank for each in parts),
            sizes=tuple(each.num_patches for each in parts),
            exchange=self,
        )

    def swap(self, ranks: Sequence[int], outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Send a tensor to each of the other ranks, and fill one from each. Called by all of them.

        Args:
            ranks: global ranks, this one included, in the same order on all of them.
            outgoing: [index of the receiver in `ranks`] -> contiguous tensor.
            incoming: [index of the sender in `ranks`] -> contiguous tensor, overwritten.
        """
        # Both directions in one batch, so that no two ranks wait for each other's send.
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
    """What the encoder needs to know about a chunk that is a part of a split item."""

    row: int
    """First row of patches."""
    num_rows: int
    """Rows of patches."""
    index: int
    """Its index among the item's parts."""
    ranks: tuple[int, ...]
    """[part of the item] -> global rank that encodes it."""
    sizes: tuple[int, ...]
    """[part of the item] -> its patches."""
    exchange: PartExchange
    """This rank's end of the exchange with the item's other ranks."""

    def gather(self, own: Tensor) -> Tensor:
        """[p, ...] of this part's patches -> [P, ...] of all patches of the item, part after part.

        Called by all ranks of the item. A backward pass has to run on all of them or on none.
        """
        return _Gather.apply(own, self)


class PartEncoder(Protocol):
    """An encoder that can also encode a part: patches [p, 3*p*p] of its rows, and the whole item's grid."""

    def __call__(self, pixels: Tensor, grid_thw: tuple[Grid, ...], part: PartOfItem | None = None) -> Tensor:
        """Features [V, D] of the items, or of the part."""


class _Gather(torch.autograd.Function):
    """Concatenates the blocks of all parts; their gradients go back to their ranks and are summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, part: PartOfItem) -> Tensor:
        ctx.part = part
        own = own.contiguous()
        gathered = own.new_empty(sum(part.sizes), *own.shape[1:])
        blocks = gathered.split(part.sizes)
        blocks[part.index].copy_(own)
        # The others' blocks are received straight into `gathered`.
        part.exchange.swap(part.ranks, [own] * len(blocks), blocks)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        part: PartOfItem = ctx.part
        blocks = gradient.contiguous().split(part.sizes)
        own = blocks[part.index]
        received = own.new_empty(len(blocks), *own.shape)
        received[part.index] = own
        part.exchange.swap(part.ranks, blocks, received.unbind())
        # One sum over all parts, in their order: in low precision it is rounded once.
        return received.sum(dim=0), None
