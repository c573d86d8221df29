"""What one rank reads for a step or an evaluation: the plan, its micro-batches, and the items it encodes.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from k25_train.data.batch import MicroBatch
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import StepPlan
from k25_train.data.vision_reader import StepVision
from k25_train.errors import DataError, K25Error
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.training.forward import DeviceBatch, to_device
from k25_train.training.tower import Tower
from parallel.dep.engine import VisionWork
from parallel.topology import Topology
from parallel.watchdog.phases import PhaseTracker


@dataclass(frozen=True, slots=True)
class HostInputs:
    """One rank's inputs in host memory."""

    sizes: BatchSizes
    """Of the global batch, the same on every rank."""
    micro_batches: list[MicroBatch]
    """The micro-batches of this rank's replica, in the order of the batch."""
    vision: StepVision
    """The items for the decoupled encoder; none with a coupled tower."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """One rank's inputs where the model is."""

    sizes: BatchSizes
    """Of the global batch, the same on every rank."""
    micro_batches: list[DeviceBatch]
    """This replica's micro-batches, in the order in which they run."""
    vision: VisionWork
    """What the decoupled encoder does; nothing with a coupled tower."""


class InputReader:
    """Plans and reads training steps, ahead of time, and evaluations; each batch is planned once."""

    def __init__(self, loader: DataLoader, tower: Tower, topology: Topology, tracker: PhaseTracker) -> None:
        self._loader = loader
        self._tower = tower
        self._topology = topology
        self._tracker = tracker
        self._steps = loader.prefetch(self._read_step)

    def step(self, step: int) -> Inputs:
        """Inputs of a training step, counted from 1; the next ones are read in the background.

        Called by every rank. Raises `DataError`, on every rank, if one of them could not read its share or
        has met too many samples that cannot be used.
        """
        return self._prepare(self._on_all_ranks(lambda: self._steps.get(step - 1)))

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> Inputs:
        """Inputs of the first `num_sequences` held-out sequences. Called by every rank, and raises as `step`.

        With `shuffle_media_seed` every sample gets another sample's images: the rise of the loss is what the
        model gains from seeing the right ones.
        """

        def read() -> HostInputs:
            plan = self._loader.plan_evaluation(num_sequences, shuffle_media_seed)
            return self._read(plan, self._tower.read_heldout(plan))

        return self._prepare(self._on_all_ranks(read))

    def _on_all_ranks(self, read: Callable[[], HostInputs]) -> HostInputs:
        """What `read` gives, if it succeeds on every rank; otherwise all raise, before any waits for another.

        So all are at the same step, and can save and stop together.
        """
        topology = self._topology
        result, failure = None, None
        try:
            result = read()
        except K25Error as error:
            failure = error
        failed = torch.tensor(0 if result is not None else topology.rank + 1, device=topology.device)
        with self._tracker.phase("agree on inputs", range(topology.world_size)):
            dist.all_reduce(failed, dist.ReduceOp.MAX)
            rank = int(failed.item()) - 1
        if failure is not None:
            raise failure
        if result is None or rank >= 0:
            other = DataError(f"rank {rank} could not read its share of the data; its own message says why")
            other.of_ranks = (rank,)
            raise other
        return result

    def _read_step(self, plan: StepPlan) -> HostInputs:
        return self._read(plan, self._tower.read(plan))

    def _read(self, plan: StepPlan, vision: StepVision) -> HostInputs:
        micro_batches = self._loader.micro_batches(
            plan,
            dp_rank=self._topology.dp_rank,
            dp_size=self._topology.dp_size,
            with_pixels=self._tower.takes_pixels and self._topology.holds_first_chunk,
        )
        return HostInputs(plan.sizes(), micro_batches, vision)

    def _prepare(self, read: HostInputs) -> Inputs:
        """Agree with the other ranks on order and failures, and move the micro-batches to the device."""
        arranged = self._tower.arrange(read.micro_batches, read.vision)
        move = partial(to_device, media_pad=self._loader.tokenizer.media_pad, device=self._topology.device)
        batches = [move(number, batch) for number, batch in enumerate(arranged)]
        return Inputs(read.sizes, batches, read.vision.work)
