"""What the two engines have in common: their inputs in a step, and their interface to it.

`upfront_engine.py` encodes before and after the pipeline, `bubble_engine.py` in its idle time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.dep.feature_exchange import FeatureExchange
from parallel.dep.plan import VisionPlan
from parallel.dep.plan_share import PlanShare
from parallel.dep.program import Program
from parallel.dep.stats import VisionStats
from parallel.dep.transfers import Transfer
from parallel.dep.vision_pass import Chunk
from parallel.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class VisionWork:
    """What the encoders do in one step, and this rank's share of the pixels."""

    plan: VisionPlan | PlanShare
    """Plan of the global batch, at least this rank's share of it."""
    chunks: Sequence[Chunk]
    """This rank's chunks of the plan."""
    transfers: Sequence[Transfer]
    """[micro-batch] -> what this rank sends and receives of it (`parallel.dep.transfers.transfers_of`)."""
    program: Program | None = None
    """When this rank encodes its chunks; None if everything is encoded upfront."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each replica."""
        return len(self.transfers)

    def is_received_by(self, rank: int, micro_batch: int) -> bool:
        """Whether a rank, of a first stage, takes any features of a micro-batch."""
        return any(receiver == rank for _, receiver in self.transfers[micro_batch])

    def micro_batch_of(self, part: int) -> int:
        """Number, within its replica, of the micro-batch of a part of the plan."""
        return self.plan.items[self.plan.parts[part].item].micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What either engine needs."""

    exchange: FeatureExchange
    """This rank's end of the exchange of features and gradients."""
    device: torch.device
    """Device of the encoder."""
    feature_dtype: torch.dtype
    """Type of the features that the backbone takes."""
    max_feature_bytes: int
    """Bound on the features, or their gradients, that a first stage keeps on its device at a time."""
    is_trained: bool
    """Whether the encoder is trained; if not, nothing is encoded a second time and no gradient is sent."""
    phase: Callable[[str], AbstractContextManager[object]]
    """Context that announces what the rank does."""


class Engine(ABC):
    """Runs the encoder of one rank in a step, and hands features and gradients over."""

    def __init__(self, setup: EngineSetup) -> None:
        self._exchange = setup.exchange
        self._device = setup.device
        self._feature_dtype = setup.feature_dtype
        self._max_feature_bytes = setup.max_feature_bytes
        self._is_trained = setup.is_trained
        self._phase = setup.phase
        self._stopwatch = Stopwatch(setup.device)
        self._stats: VisionStats | None = None

    @property
    def stats(self) -> VisionStats:
        """What this rank did in the last step. Synchronizes with the device."""
        assert self._stats is not None, "no step has run yet"
        self._stopwatch.read_into(self._stats)
        return self._stats

    @abstractmethod
    def start(self, work: VisionWork) -> None:
        """Do what has to precede the pipeline. Called by every rank."""

    @abstractmethod
    def before_pass(self, num_done: int) -> None:
        """Do what is planned before the rank's next pass, of which it has done `num_done`.

        Called by every rank, at least once before each pass and after the last one.
        """

    @abstractmethod
    def leaf(self, micro_batch: int) -> Tensor | None:
        """The features [v, D] of those placeholders of a micro-batch that are on this rank, as a leaf of the
        backbone's graph.

        None if there are none. The first stage takes it once, when it runs forward; the engine collects
        its gradient.
        """

    @abstractmethod
    def finish(self) -> None:
        """Do the rest after the pipeline, and release pixels and features. Called by every rank."""

    def _make_leaf(self, features: Tensor, collect: Callable[[Tensor], None]) -> Tensor:
        """The features as a leaf of the backbone's graph; its gradient is passed to `collect`, once."""
        leaf = features.to(self._feature_dtype)
        # In an evaluation, or with a frozen encoder, nobody needs a gradient.
        if not self._is_trained or not torch.is_grad_enabled():
            return leaf

        def collect_and_free(leaf: Tensor) -> None:
            # Whoever collects the gradient frees it once it is sent: the leaf must not keep it.
            assert leaf.grad is not None
            collect(leaf.grad)
            leaf.grad = None

        leaf.requires_grad_()
        leaf.register_post_accumulate_grad_hook(collect_and_free)
        return leaf
