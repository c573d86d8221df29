"""Features from the ranks that encoded them to the first stages, and their gradients back.

This is all that ranks send to each other about items, but for which ones did not decode, and what passes
between the ranks that encode one item together (`parts.py`). One piece of the exchange is one number of
micro-batch, of all replicas at once. Both ends read it from the plan and post it in the same slot, piece
after piece in one order, so that no message is waited for that is not under way.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dep.plan import Piece, VisionPlan


class FeatureExchange:
    """This rank's end of it."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        first_stage_ranks: Sequence[int],
        *,
        width: int,
        wire_dtype: torch.dtype,
        device: torch.device,
        phase: Callable[[str, Sequence[int]], AbstractContextManager[object]],
    ) -> None:
        """
        Args:
            group: all ranks of the job, for nothing else than vision.
            first_stage_ranks: [replica] -> global rank of its first pipeline stage.
            width: D of features [V, D].
            wire_dtype: format of features and gradients under way, also of those that stay on their rank, so
                that no value depends on who encodes what.
            phase: announces what this rank waits for, and the global ranks that it waits for.
        """
        self._group = group
        self.rank = dist.get_rank()
        self._first_stage_ranks = first_stage_ranks
        self._width = width
        self._wire_dtype = wire_dtype
        self._device = device
        self._phase = phase
        self.sent_bytes = 0
        """What this rank has sent to others so far."""
        is_first = self.rank in first_stage_ranks
        self.replica = first_stage_ranks.index(self.rank) if is_first else None
        """The replica whose first stage this rank is; None on later stages."""

    def to_first_stages(self, plan: VisionPlan, piece: Piece, own: Mapping[int, Tensor]) -> Tensor | None:
        """Send this rank's features of a piece, and receive its replica's.

        Args:
            own: number of a part -> its features [n, D], at least those of this piece.

        Returns the features [V, D] of the replica's micro-batch, in placeholder order; None on later stages,
        and where the micro-batch has no items.
        """
        messages: list[tuple[list[int], Tensor]] = []
        operations = []
        for (sender, replica), parts in piece.items():
            receiver = self._first_stage_ranks[replica]
            if sender == self.rank:
                rows = torch.cat([own[part] for part in parts]).to(self._wire_dtype)
                if receiver == self.rank:
                    messages.append((parts, rows))
                else:
                    operations.append(self._send(rows, receiver))
            elif receiver == self.rank:
                rows = self._empty(sum(plan.parts[part].num_tokens for part in parts))
                messages.append((parts, rows))
                operations.append(dist.P2POp(dist.irecv, rows, sender, self._group))
        self._run(operations)
        if not messages:
            return None
        features = self._empty(sum(rows.shape[0] for _, rows in messages))
        for parts, rows in messages:
            for part, block in zip(parts, rows.split(_num_tokens(plan, parts)), strict=True):
                offset = plan.parts[part].offset
                features[offset : offset + block.shape[0]] = block
        return features

    def to_encoders(self, plan: VisionPlan, piece: Piece, gradient: Tensor | None) -> dict[int, Tensor]:
        """Send the gradient [V, D] of a replica's features of a piece, and receive those of own parts.

        Returns the number of each part that this rank encoded of the piece -> its gradient [n, D].
        """
        messages: list[tuple[list[int], Tensor]] = []
        operations = []
        for (encoder, replica), parts in piece.items():
            owner = self._first_stage_ranks[replica]
            if owner == self.rank:
                assert gradient is not None, "the first stage has run backward"
                offsets = [(plan.parts[part].offset, plan.parts[part].num_tokens) for part in parts]
                rows = torch.cat([gradient[start : start + size] for start, size in offsets])
                rows = rows.to(self._wire_dtype)
                if encoder == self.rank:
                    messages.append((parts, rows))
                else:
                    operations.append(self._send(rows, encoder))
            elif encoder == self.rank:
                rows = self._empty(sum(_num_tokens(plan, parts)))
                messages.append((parts, rows))
                operations.append(dist.P2POp(dist.irecv, rows, owner, self._group))
        self._run(operations)
        return {
            part: block
            for parts, rows in messages
            for part, block in zip(parts, rows.split(_num_tokens(plan, parts)), strict=True)
        }

    def _send(self, rows: Tensor, receiver: int) -> dist.P2POp:
        self.sent_bytes += rows.nbytes
        return dist.P2POp(dist.isend, rows, receiver, self._group)

    def _empty(self, num_tokens: int) -> Tensor:
        return torch.empty(num_tokens, self._width, dtype=self._wire_dtype, device=self._device)

    def _run(self, operations: list[dist.P2POp]) -> None:
        if operations:
            peers = sorted({operation.peer for operation in operations})
            with self._phase("features", peers):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()


def _num_tokens(plan: VisionPlan, parts: Sequence[int]) -> list[int]:
    return [plan.parts[part].num_tokens for part in parts]
