"""What a step asks of the vision tower, wherever it is: `decoupled_tower.py` or, its do-nothing twin, below.

A coupled tower is a module of the first chunk: pixels come with the micro-batches of first stages, and it
goes forward and backward within the pipeline's schedule. Nothing remains to be done around the schedule.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.data.batch import MicroBatch, mask_failed
from k25_train.data.mix.plan import StepPlan
from k25_train.data.vision_reader import StepVision
from parallel.dep.engine import VisionWork
from parallel.dep.plan import VisionPlan
from parallel.dep.stats import VisionSummary
from parallel.megatron.replicas import EncoderReplica
from parallel.topology import Topology

NOTHING_TO_ENCODE = StepVision(
    VisionWork(VisionPlan(items=(), num_ranks=1, parts=(), chunks=((),), costs=(0,)), (), ()), (), (), {}
)
"""What there is to do for a decoupled encoder where there is none."""


@dataclass(frozen=True, slots=True)
class NoSummary:
    """The figures of a coupled tower, which has none."""


class Evaluating(Protocol):
    """The tower in an evaluation, which goes forward only."""

    def start(self, work: VisionWork) -> None:
        """Do what comes before the pipeline. Called by every rank."""

    def leaf(self, micro_batch: int) -> Tensor | None:
        """Features [V, D] of a micro-batch of this rank's replica; None if nothing was encoded for it."""

    def release(self) -> None:
        """Free pixels and features after the pipeline."""


class Tower(Protocol):
    """The vision tower in a training step."""

    @property
    def replicas(self) -> Sequence[EncoderReplica]:
        """Modules next to the chunks that every rank has a replica of."""

    @property
    def evaluating(self) -> Evaluating:
        """The same tower for evaluations."""

    @property
    def takes_pixels(self) -> bool:
        """Whether the micro-batches of first stages come with pixels."""

    def read(self, plan: StepPlan) -> StepVision:
        """Divide the items of a global batch over all ranks and decode this rank's. May run in a thread."""

    def read_heldout(self, plan: StepPlan) -> StepVision:
        """The same for an evaluation."""

    def arrange(self, batches: Sequence[MicroBatch], vision: StepVision) -> list[MicroBatch]:
        """This replica's micro-batches in the order in which they run, without the loss of documents whose
        media did not decode, on whichever rank. Called by every rank."""

    def start(self, work: VisionWork) -> None:
        """Do what comes before the pipeline. Called by every rank."""

    def before_pass(self, num_done: int) -> None:
        """Do what comes before the pass that follows the first `num_done` ones of this rank."""

    def leaf(self, micro_batch: int) -> Tensor | None:
        """Features [V, D] of a micro-batch of this rank's replica, whose gradient the tower collects; None if
        nothing was encoded for it."""

    def finish(self, num_tokens: int) -> None:
        """Do what comes after the pipeline, and divide gradients by `num_tokens`. Called by every rank."""

    def summary(self) -> VisionSummary | NoSummary:
        """Figures of the last step over all ranks. Called by every rank."""


class CoupledTower:
    """Does nothing around the schedule: the tower is part of the first chunk."""

    takes_pixels = True

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    @property
    def replicas(self) -> Sequence[EncoderReplica]:
        """No modules: the tower is in the first chunk."""
        return ()

    @property
    def evaluating(self) -> Evaluating:
        """The same object: it does nothing in evaluations either."""
        return self

    def read(self, plan: StepPlan) -> StepVision:
        """No items: pixels are in the micro-batches."""
        return NOTHING_TO_ENCODE

    read_heldout = read

    def arrange(self, batches: Sequence[MicroBatch], vision: StepVision) -> list[MicroBatch]:
        """The micro-batches as they are, without the loss of what the first stage could not decode.

        Only the first stage decodes; without this the last stage would learn from a blank image.
        """
        failed = [batch.failed_items for batch in batches]
        if self._topology.pp_size > 1:
            failed = self._of_first_stage(failed)
        return [mask_failed(batch, items) for batch, items in zip(batches, failed, strict=True)]

    def _of_first_stage(self, failed: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """[micro-batch] -> items that this pipeline's first stage could not decode."""
        first, group = self._topology.first_stage_rank, self._topology.groups.pp
        # Objects are sent through pickle and two collectives: only if there is anything to send.
        count = torch.tensor(sum(map(len, failed)), device=self._topology.device)
        dist.broadcast(count, first, group=group)
        if not count.item():
            return failed
        box = [failed]
        dist.broadcast_object_list(box, first, group=group)
        return box[0]

    def start(self, work: VisionWork) -> None:
        """Do nothing."""

    def before_pass(self, num_done: int) -> None:
        """Do nothing."""

    def leaf(self, micro_batch: int) -> Tensor | None:
        """None: the first chunk encodes pixels itself."""
        return None

    def finish(self, num_tokens: int) -> None:
        """Do nothing: its gradients are among the first chunk's."""

    def release(self) -> None:
        """Do nothing."""

    def summary(self) -> NoSummary:
        """No figures."""
        return NoSummary()
