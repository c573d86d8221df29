"""How the ranks that share a micro-batch get each other's latents, and gradients of latents back.

Each rank holds the latents of its tokens, [t, C], and visits blocks of latents: in a forward pass to attend
to them, in a backward pass to say what gradient they get from it. Which ranks' tokens a block has is the
`order`. Every rank makes the same calls in the same order, whatever its documents are.

    AllGather                                    Ring, of ranks 0 to 3: block of rank 0
    one block of all tokens                      rank 0   rank 1   rank 2   rank 3
    gradients: each rank sends every other          0 ──►   0  ──►   0  ──►   0      while they attend to it
    one those of its tokens, which it adds up              g1  ──►  g1+g2 ──► g1+g2+g3 ──► rank 0
    in the order of ranks

Gradients travel in float32: each is the sum of what all ranks contribute, as on one rank, where a matrix
product sums it. A pass forward sends (S - 1) t C numbers per rank of S, a pass backward as many and as many
gradients, with both.

Shapes: t tokens of a rank, S ranks, n tokens of a block, C width of a latent.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.config import ContextExchange
from parallel.megatron.patches.instrument import waiting_for

PHASE = "latents"
"""What a rank is doing while it waits for others that share its sequences: for latents, or, in routers, for
counts."""


class LatentExchange(Protocol):
    """One rank's end of the exchange."""

    num_ranks: int
    """S, 1 if micro-batches are not shared."""
    order: tuple[tuple[int, ...], ...]
    """[block] -> the ranks whose tokens it has, one after another."""
    sent_bytes: int
    """Bytes that this rank has sent to others since it was created."""

    def forward(self, own: Tensor, visit: Callable[[int, Tensor], None]) -> None:
        """Visit each block with its number and its latents [n, C]. `own` are the rank's latents [t, C]."""

    def backward(self, own: Tensor, visit: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Visit each block again; a visit returns the gradient of its latents, [n, C] float32.

        Returns the sum of the gradients that all ranks have for this rank's latents, [t, C] float32.
        """


class AllGather:
    """Latents of all ranks at once."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.num_ranks = group, group.size()
        self._members = dist.get_process_group_ranks(group)
        self.order: tuple[tuple[int, ...], ...] = (tuple(range(self.num_ranks)),)
        self.sent_bytes = 0

    def forward(self, own: Tensor, visit: Callable[[int, Tensor], None]) -> None:
        """See `LatentExchange`."""
        visit(0, self._gather(own))

    def backward(self, own: Tensor, visit: Callable[[int, Tensor], Tensor]) -> Tensor:
        """See `LatentExchange`."""
        gradients = visit(0, self._gather(own))
        received = torch.empty_like(gradients)
        with waiting_for(self._members, PHASE):
            dist.all_to_all_single(received, gradients, group=self._group)
        self.sent_bytes += gradients.nbytes // self.num_ranks * (self.num_ranks - 1)
        return received.view(self.num_ranks, *own.shape).sum(0)

    def _gather(self, own: Tensor) -> Tensor:
        own = own.contiguous()
        latents = own.new_empty(self.num_ranks * own.shape[0], *own.shape[1:])
        with waiting_for(self._members, PHASE):
            dist.all_gather_into_tensor(latents, own, group=self._group)
        self.sent_bytes += own.nbytes * (self.num_ranks - 1)
        return latents


class Ring:
    """Latents of one rank after another, each from the rank before; the next while one is visited."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.num_ranks, rank = group, group.size(), group.rank()
        self._next, self._previous = (
            dist.get_global_rank(group, (rank + step) % self.num_ranks) for step in (1, -1)
        )
        self.order: tuple[tuple[int, ...], ...] = tuple(
            ((rank - step) % self.num_ranks,) for step in range(self.num_ranks)
        )
        self.sent_bytes = 0

    def forward(self, own: Tensor, visit: Callable[[int, Tensor], None]) -> None:
        """See `LatentExchange`."""
        self._walk(own, visit)

    def backward(self, own: Tensor, visit: Callable[[int, Tensor], Tensor]) -> Tensor:
        """See `LatentExchange`."""
        gradients: list[Tensor] = []
        arriving: list[_Passing] = []

        def visit_and_add(block: int, latents: Tensor) -> None:
            gradient = visit(block, latents)
            # The own block's gradient stays here; that of another comes by with what the ranks before added.
            if block > 1:
                gradient += arriving.pop().wait()
            if block > 0:
                arriving.append(self._pass_on(gradient))
            else:
                gradients.append(gradient)

        self._walk(own, visit_and_add)
        return gradients[0] + arriving.pop().wait()

    def _walk(self, own: Tensor, visit: Callable[[int, Tensor], None]) -> None:
        latents = own.contiguous()
        for block in range(self.num_ranks):
            is_last = block == self.num_ranks - 1
            following = [] if is_last else [self._pass_on(latents)]
            visit(block, latents)
            for passing in following:
                latents = passing.wait()

    def _pass_on(self, tensor: Tensor) -> "_Passing":
        """Start to send a tensor to the next rank, and to receive one from the rank before."""
        received = torch.empty_like(tensor)
        self.sent_bytes += tensor.nbytes
        # In one batch, so that no two ranks wait for each other's send.
        operations = [
            dist.P2POp(dist.isend, tensor, self._next, self._group),
            dist.P2POp(dist.irecv, received, self._previous, self._group),
        ]
        neighbours = (self._previous, self._next)
        return _Passing(dist.batch_isend_irecv(operations), tensor, received, neighbours)


class _Passing:
    """A tensor on its way to the next rank, and one on its way here. Both live until they have arrived."""

    def __init__(
        self, works: Sequence[Any], sent: Tensor, received: Tensor, neighbours: tuple[int, int]
    ) -> None:
        self._works, self._sent, self._received = works, sent, received
        self._neighbours = neighbours

    def wait(self) -> Tensor:
        """The tensor that has arrived, for what is computed from now on."""
        with waiting_for(self._neighbours, PHASE):
            for work in self._works:
                work.wait()
        return self._received


class NotShared:
    """Micro-batches are on one rank each, and attention needs no latents of others."""

    num_ranks = 1
    order: tuple[tuple[int, ...], ...] = ()
    sent_bytes = 0

    def forward(self, own: Tensor, visit: Callable[[int, Tensor], None]) -> None:
        """There is no block to visit."""

    def backward(self, own: Tensor, visit: Callable[[int, Tensor], Tensor]) -> Tensor:
        """There is no block to visit."""
        return torch.zeros_like(own, dtype=torch.float32)


NOT_SHARED = NotShared()


def build_exchange(kind: ContextExchange, group: dist.ProcessGroup) -> LatentExchange:
    """The exchange among the ranks of `group`, which share micro-batches."""
    if group.size() == 1:
        return NOT_SHARED
    return AllGather(group) if kind is ContextExchange.all_gather else Ring(group)
