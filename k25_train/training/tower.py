"""What a step asks of the vision tower, wherever it is: `decoupled_tower.py` or, its do-nothing twin, below.

A coupled tower is a module of the first chunk: pixels come with the micro-batches of first stages, and it
goes forward and backward within the pipeline's schedule. Nothing remains to be done around the schedule.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from parallel.dep.engine import VisionWork
from parallel.dep.stats import VisionSummary
from parallel.megatron.replicas import EncoderReplica


@dataclass(frozen=True, slots=True)
class NoSummary:
    """The figures of a coupled tower, which has none."""


class Evaluating(Protocol):
    """The tower in an evaluation, which goes forward only."""

    def start(self, work: VisionWork) -> None:
        """Do what comes before the pipeline. Called by every rank."""

    def leaf(self, micro_batch: int) -> Tensor | None:
        """Features [V, D] of a micro-batch's placeholders on this rank; None if nothing was encoded."""

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

    def start(self, work: VisionWork) -> None:
        """Do what comes before the pipeline. Called by every rank."""

    def before_pass(self, num_done: int) -> None:
        """Do what comes before the pass that follows the first `num_done` ones of this rank."""

    def leaf(self, micro_batch: int) -> Tensor | None:
        """Features [V, D] of a micro-batch's placeholders on this rank, whose gradient the tower collects;
        None if nothing was encoded."""

    def finish(self, num_tokens: int) -> None:
        """Do what comes after the pipeline, and divide gradients by `num_tokens`. Called by every rank."""

    def summary(self) -> VisionSummary | NoSummary:
        """Figures of the last step over all ranks. Called by every rank."""


class CoupledTower:
    """Does nothing around the schedule: the tower is part of the first chunk."""

    @property
    def replicas(self) -> Sequence[EncoderReplica]:
        """No modules: the tower is in the first chunk."""
        return ()

    @property
    def evaluating(self) -> Evaluating:
        """The same object: it does nothing in evaluations either."""
        return self

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
