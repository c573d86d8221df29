"""Features from the ranks that encoded them to the first stages, and their gradients back.

This is all that ranks send to each other about items, apart from which ones did not decode and what the ranks
of a split item exchange (`part_exchange.py`). A rank of a first stage receives the rows whose placeholders it
holds, and no others. One transfer covers the micro-batches of one number in all
replicas at once. Both ends read their transfers from the plan and post them in the same order, each with
everything that the rank sends and receives of it. Features and gradients use separate groups where transfers
of one kind are posted between transfers of the other, as in bubbles.

Posting must not wait for the other end. NCCL does wait when a group first communicates at all, which it does
before the first step (`parallel.warm_up`), and when two ranks first meet in a group, which happens while
ranks have nothing else to wait for (`connect`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dep.plan import VisionPlan
from parallel.dep.plan_share import PlanShare
from parallel.dep.transfers import Stretch, Transfer

Phase = Callable[[str, Sequence[int]], AbstractContextManager[object]]
"""Context that announces what a rank waits for, and the global ranks that it waits for."""
Message = tuple[list[Stretch], Tensor]
"""What one sender sends to one receiver of each part, and the rows of all of it, one after another."""


class Posted[Result]:
    """A transfer in flight."""

    def __init__(
        self,
        name: str,
        operations: list[dist.P2POp],
        phase: Phase,
        result: Callable[[], Result],
    ) -> None:
        """
        Args:
            name: name under which waiting for it is announced.
            operations: sends and receives, which are posted at once.
            phase: announces the waiting.
            result: builds what the caller gets from what was received and what stayed on this rank.
        """
        self._name = name
        # They hold the tensors that are sent until those have left.
        self._operations = operations
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._phase = phase
        self._result = result
        self.nbytes = sum(operation.tensor.nbytes for operation in operations)
        """Bytes sent and received."""

    def is_done(self) -> bool:
        """Whether everything has been sent and received; if so, releases what was sent.

        On gloo it is True only after a wait.
        """
        if all(work.is_completed() for work in self._works):
            self._operations, self._works = [], []
        return not self._operations

    def finish(self) -> None:
        """Wait until everything has been sent and received."""
        if self._operations:
            with self._phase(self._name, sorted({operation.peer for operation in self._operations})):
                for work in self._works:
                    work.wait()
        self._operations, self._works = [], []

    def wait(self) -> Result:
        """Wait until everything has been sent and received, and build the result. Call it once."""
        self.finish()
        return self._result()


class FeatureExchange:
    """This rank's end of the exchange."""

    def __init__(
        self,
        feature_group: dist.ProcessGroup,
        gradient_group: dist.ProcessGroup,
        first_stage_ranks: Sequence[int],
        *,
        width: int,
        wire_dtype: torch.dtype,
        device: torch.device,
        phase: Phase,
    ) -> None:
        """
        Args:
            feature_group: all ranks of the job; used for features, and for their gradients if both are one.
            gradient_group: all ranks of the job; used for gradients of features only.
            first_stage_ranks: global ranks of the first pipeline stage.
            width: D of features.
            wire_dtype: type of features and gradients in flight, and of those that stay on their rank, so
                that no value depends on who encodes what.
            device: where features and gradients are.
            phase: announces what this rank waits for.
        """
        self._feature_group = feature_group
        self._gradient_group = gradient_group
        self.rank = dist.get_rank()
        self._width = width
        self._wire_dtype = wire_dtype
        self._device = device
        self._phase = phase
        self.sent_bytes = 0
        """Bytes that this rank has sent to others since it was created."""
        self.is_first_stage = self.rank in first_stage_ranks
        """Whether this rank takes features, of a replica's first stage."""
        self._groups = [feature_group] if feature_group is gradient_group else [feature_group, gradient_group]
        self._connected: set[int] = set()

    def connect(self, transfers: Sequence[Transfer]) -> None:
        """Set up connections to the ranks of these transfers that this rank has not met before.

        Called by every rank, with its transfers of one plan, so that both ends of a pair take part. A first
        stage meets at most as many ranks per step as its replica has items, and NCCL connects 128 of them at
        a time (`NCCL_CONNECT_ROUND_MAX_PEERS`): with 16,800 items, all 255 others of 256 ranks in the first
        step, at 4,096 ranks 66 per step until it knows most of them, after some hundred steps. Ranks that
        never exchange anything never meet.
        """
        # 1. Ranks that exchange something in this step for the first time.
        ranks = {rank for transfer in transfers for pair in transfer for rank in pair}
        peers = ranks - self._connected - {self.rank}
        self._connected |= peers
        # 2. One byte each way, in both groups: NCCL connects two ranks per group, when they first meet.
        for group in self._groups:
            operations = []
            for peer in sorted(peers):
                for operation in (dist.isend, dist.irecv):
                    number = torch.zeros(1, dtype=torch.uint8, device=self._device)
                    operations.append(dist.P2POp(operation, number, peer, group))
            Posted("meet", operations, self._phase, lambda: None).wait()

    def post_features(self, transfer: Transfer, own: Mapping[int, Tensor]) -> Posted[Tensor | None]:
        """Start sending this rank's features of a transfer, and receiving those of its placeholders.

        Args:
            own: number of a part -> its features [n, D], at least for the parts of this transfer.

        The result is the features [v, D] of the micro-batch's placeholders on this rank, in their order; None
        where it has none.
        """
        messages: list[Message] = []
        operations = []
        for (sender, receiver), stretches in transfer.items():
            # Own features leave, or stay here in the same type; those of others arrive.
            if sender == self.rank:
                rows = torch.cat(
                    [own[each.part].narrow(0, each.first, each.num_tokens) for each in stretches]
                )
                rows = rows.to(self._wire_dtype)
                if receiver == self.rank:
                    messages.append((stretches, rows))
                else:
                    operations.append(self._send(rows, receiver, self._feature_group))
            elif receiver == self.rank:
                rows = self._empty(_sizes(stretches))
                messages.append((stretches, rows))
                operations.append(dist.P2POp(dist.irecv, rows, sender, self._feature_group))
        return Posted("features", operations, self._phase, lambda: self._put_together(messages))

    def _put_together(self, messages: Sequence[Message]) -> Tensor | None:
        if not messages:
            return None
        # Parts of several senders alternate in the micro-batch: each row goes to its own offset.
        features = self._empty([rows.shape[0] for _, rows in messages])
        for stretches, rows in messages:
            for each, block in zip(stretches, rows.split(_sizes(stretches)), strict=True):
                features[each.offset : each.offset + each.num_tokens] = block
        return features

    def post_gradients(
        self, plan: VisionPlan | PlanShare, transfer: Transfer, gradient: Tensor | None
    ) -> Posted[dict[int, Tensor]]:
        """Start sending the gradient [v, D] of the features that this rank took, and receiving that of own
        parts.

        The result maps the number of each part of the transfer that this rank encoded to its gradient [n, D].
        """
        messages: list[Message] = []
        operations = []
        for (encoder, owner), stretches in transfer.items():
            # The reverse of `post_features`: each encoder's rows go back to it.
            if owner == self.rank:
                assert gradient is not None, "the first stage has run backward"
                rows = torch.cat([gradient.narrow(0, each.offset, each.num_tokens) for each in stretches])
                rows = rows.to(self._wire_dtype)
                if encoder == self.rank:
                    messages.append((stretches, rows))
                else:
                    operations.append(self._send(rows, encoder, self._gradient_group))
            elif encoder == self.rank:
                rows = self._empty(_sizes(stretches))
                messages.append((stretches, rows))
                operations.append(dist.P2POp(dist.irecv, rows, owner, self._gradient_group))
        return Posted("feature gradients", operations, self._phase, lambda: _by_part(plan, messages))

    def _send(self, rows: Tensor, receiver: int, group: dist.ProcessGroup) -> dist.P2POp:
        self.sent_bytes += rows.nbytes
        return dist.P2POp(dist.isend, rows, receiver, group)

    def _empty(self, sizes: Sequence[int]) -> Tensor:
        return torch.empty(sum(sizes), self._width, dtype=self._wire_dtype, device=self._device)


def _by_part(plan: VisionPlan | PlanShare, messages: Sequence[Message]) -> dict[int, Tensor]:
    """Part -> its gradient [n, D], put together of what each receiver of its rows has sent back."""
    found: dict[int, Tensor] = {}
    for stretches, rows in messages:
        for each, block in zip(stretches, rows.split(_sizes(stretches)), strict=True):
            num_tokens = plan.parts[each.part].num_tokens
            if each.num_tokens == num_tokens:
                found[each.part] = block
                continue
            if each.part not in found:
                found[each.part] = block.new_empty(num_tokens, block.shape[1])
            found[each.part][each.first : each.first + each.num_tokens] = block
    return found


def _sizes(stretches: Sequence[Stretch]) -> list[int]:
    return [each.num_tokens for each in stretches]
