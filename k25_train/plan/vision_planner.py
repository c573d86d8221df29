"""Who encodes which item of a global batch, and when; torch-free.

A planner orders the micro-batches of each replica and plans their items; the same on every rank.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from k25_train.config.schema import Config
from k25_train.plan.memory.stage import chunk_memory
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.step import decoupled_cost, step_times
from parallel.dep.bubbles import Placement, TimedItem, order_costly_to_middle, plan_bubbles
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, VisionPlan, plan_vision
from parallel.dep.plan_share import PlanShare, Shared, plan_share, share_of_whole
from parallel.dep.program import Program, chunks_of, chunks_of_rank, program_of
from parallel.dep.transfers import Receiver
from parallel.pipeline.schedule import RECOMPUTE_AND_BACKWARD_COST

MOST_PLANNERS = 64
"""Sizes of the global batch that planners are kept for: a step of rollouts has any size. Our choice."""


class VisionPlanner(Protocol):
    """Plans the vision work of a step."""

    def order(self, micro_batches: Sequence[Sequence[Grid]]) -> Sequence[int]:
        """The order in which a replica takes its micro-batches, of which the items are given."""

    def plan(self, items: Sequence[VisionItem]) -> tuple[VisionPlan, Program | None]:
        """Plan items of a global batch, sorted by replica, position of the micro-batch, and placeholder.

        The program says when this rank encodes its chunks; None if that is before and after the pipeline.
        """

    def share(self, items: Sequence[VisionItem], receiver: Receiver) -> tuple[Shared, Program | None]:
        """A rank's share of what `plan` gives, in a fraction of the time."""


class UpfrontPlanner:
    """Everything is encoded before the pipeline starts, balanced over all ranks."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._cost = decoupled_cost(config)

    def order(self, micro_batches: Sequence[Sequence[Grid]]) -> Sequence[int]:
        """The order that they have."""
        return range(len(micro_batches))

    def plan(self, items: Sequence[VisionItem]) -> tuple[VisionPlan, Program | None]:
        """See `VisionPlanner`."""
        plan = plan_vision(
            items,
            self._config.world_size,
            self._cost,
            max_patches_per_chunk=self._config.dep.max_patches_per_chunk,
            split=self._config.dep.split_items,
        )
        return plan, None

    def share(self, items: Sequence[VisionItem], receiver: Receiver) -> tuple[Shared, Program | None]:
        """See `VisionPlanner`."""
        shared = plan_share(
            items,
            self._config.world_size,
            self._cost,
            receiver,
            max_patches_per_chunk=self._config.dep.max_patches_per_chunk,
            split=self._config.dep.split_items,
        )
        return shared, None


class BubblePlanners:
    """A `BubblePlanner` for each size that the global batch has: the pipeline's idle times depend on it."""

    def __init__(self, config: Config, rank: int) -> None:
        """`rank` is the one whose programs are planned. Planners are made as steps need them."""
        self._config, self._rank = config, rank
        self._planners: dict[int, BubblePlanner] = {}
        self._largest = self._of(config.num_micro_batches)

    def order(self, micro_batches: Sequence[Sequence[Grid]]) -> Sequence[int]:
        """See `VisionPlanner`; no idle time matters."""
        return self._largest.order(micro_batches)

    def plan(self, items: Sequence[VisionItem]) -> tuple[VisionPlan, Program | None]:
        """See `VisionPlanner`; of a batch of the largest size."""
        return self._largest.plan(items)

    def share(self, items: Sequence[VisionItem], receiver: Receiver) -> tuple[Shared, Program | None]:
        """See `VisionPlanner`; `receiver` is this rank."""
        return self._of(receiver.num_micro_batches).share(items, receiver)

    def _of(self, num_micro_batches: int) -> "BubblePlanner":
        """The planner of steps of so many micro-batches on a replica."""
        if num_micro_batches not in self._planners:
            if len(self._planners) == MOST_PLANNERS:
                del self._planners[next(iter(self._planners))]
            pipeline = plan_pipeline(self._config, num_micro_batches)
            self._planners[num_micro_batches] = BubblePlanner(pipeline, self._rank)
        return self._planners[num_micro_batches]


class BubblePlanner:
    """Items are encoded where the pipeline leaves ranks idle."""

    def __init__(self, pipeline: PipelinePlan, rank: int) -> None:
        """`rank` is the one whose program is planned."""
        config = pipeline.config
        self._config = config
        self._rank = rank
        self._cost = decoupled_cost(config)
        self._times = step_times(pipeline)
        self._memory = chunk_memory(pipeline)
        self._is_trained = bool(config.vision_placement.trained_encoder_parts)

    def order(self, micro_batches: Sequence[Sequence[Grid]]) -> Sequence[int]:
        """Micro-batches with costly items go to the middle of the step (see `order_costly_to_middle`)."""
        return order_costly_to_middle(
            [max(map(self._cost.of_item, grids), default=0) for grids in micro_batches]
        )

    def plan(self, items: Sequence[VisionItem]) -> tuple[VisionPlan, Program | None]:
        """See `VisionPlanner`."""
        config = self._config
        placements = self._place(items)
        # Items of a rank that run together form chunks; this rank's become its program.
        limit = self._memory.most_joined(config.dep.max_patches_per_chunk)
        plan, places = chunks_of(items, placements, config.world_size, self._cost, limit)
        return plan, self._program(plan, places[self._rank])

    def share(self, items: Sequence[VisionItem], receiver: Receiver) -> tuple[Shared, Program | None]:
        """See `VisionPlanner`; `receiver` is this rank."""
        placements = self._place(items)
        rank_of = np.array([placement.rank for placement in placements], dtype=np.int64)
        own = np.flatnonzero(rank_of == self._rank).tolist()
        limit = self._memory.most_joined(self._config.dep.max_patches_per_chunk)
        chunks, places = chunks_of_rank(own, items, placements, limit)
        shared = share_of_whole(items, rank_of, chunks, receiver)
        return shared, self._program(shared.plan, places)

    def _program(self, plan: VisionPlan | PlanShare, own: Sequence[Placement]) -> Program:
        times = self._times
        return program_of(self._rank, plan, own, times.text, self._config.dp_cp, times.reduce_s, self._memory)

    def _place(self, items: Sequence[VisionItem]) -> Sequence[Placement]:
        """Where each item is encoded."""
        config, times = self._config, self._times
        # 1. The exchange is planned for the micro-batch with the most vision tokens.
        num_tokens: dict[tuple[int, int], int] = {}
        for item in items:
            key = item.replica, item.micro_batch
            num_tokens[key] = num_tokens.get(key, 0) + item.num_tokens
        # 2. Items go to the idle times of the pipeline.
        found = plan_bubbles(
            times.text,
            [self._timed(item) for item in items],
            config.dp_cp,
            num_steps=config.model.vision.num_layers,
            exchange_s=times.exchange_s(max(num_tokens.values(), default=0)),
            gather_s=times.gather_s,
            reduce_s=times.reduce_s,
        )
        if self._is_trained:
            return found.placements
        return [placement._replace(backward=()) for placement in found.placements]

    def _timed(self, item: VisionItem) -> TimedItem:
        forward_s, copy_s = self._times.forward_s(item.grid_thw), self._times.copy_s(item.grid_thw)
        # Without room for its activations, each layer runs once more before its backward.
        num_forward = RECOMPUTE_AND_BACKWARD_COST + (not self._memory.keeps(item.num_patches))
        backward_s = num_forward * forward_s + copy_s if self._is_trained else 0.0
        return TimedItem(item.replica, item.micro_batch, forward_s + copy_s, backward_s)
