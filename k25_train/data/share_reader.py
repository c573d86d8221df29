"""One rank's share of every batch, from plan to arrays: what `source.py` gives to the training process.

Knows the configuration and the rank's place, and no process group: it runs in whichever process reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from k25_train.config.schema import Config
from k25_train.data.batch import MicroBatch, Reads
from k25_train.data.mix.plan import StepPlan
from k25_train.data.readable_source import ReadableSource
from k25_train.data.served import Served
from k25_train.data.step_batches import StepBatches, stack
from k25_train.data.units import UnitReading
from k25_train.data.vision_reader import NoVision, VisionReader, VisionSource
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.vision_planner import BubblePlanners, UpfrontPlanner, VisionPlanner
from parallel.config import DepMode, DepSchedule
from parallel.dep.engine import VisionWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of each batch a rank reads."""

    rank: int
    """Global rank, for the items that it encodes."""
    dp_rank: int
    """Its replica, for the micro-batches."""
    dp_size: int
    """Number of replicas."""
    reads: Reads
    """What it needs of them."""


class Failure(NamedTuple):
    """A sample of a micro-batch that a rank could not use, for the ranks that read other parts of it."""

    replica: int
    """Replica of the micro-batch."""
    micro_batch: int
    """Number of the micro-batch, in the order in which they run."""
    item: int | None
    """Position of the item that did not decode; None where it is the words that cannot be used."""
    document: int | None
    """Position of the document whose words cannot be used; None for an item."""
    sample: str
    """Where it is, as messages say it."""
    reason: str
    """Why; empty where the rank that met it has counted it itself."""


@dataclass(frozen=True, slots=True)
class HostInputs:
    """One rank's inputs of a step or an evaluation in host memory."""

    sizes: BatchSizes
    """Of the global batch, the same on every rank."""
    batches: StepBatches
    """The micro-batches of this rank's replica, in the order in which they run."""
    vision: VisionWork
    """What the decoupled encoder does; nothing with a coupled tower."""
    failures: tuple[Failure, ...]
    """What could not be used."""
    served: Mapping[str, Served]
    """What each source has given to the global batch."""
    state_after: Mapping[str, Any]
    """Where the loader is after a training step, as JSON has it, for `DataSource.start_from`; a few KB. Empty
    for an evaluation."""


class PlanReader(Protocol):
    """Plans batches and reads them: a `DataLoader`, or what reads trajectories next to one."""

    @property
    def sources(self) -> Mapping[str, ReadableSource]:
        """By name, in the order of their numbers."""

    @property
    def reading(self) -> UnitReading:
        """Who reads and decodes."""

    def plan_evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> StepPlan:
        """Held-out sequences, the same every time."""

    def state_after(self, plan: StepPlan) -> dict[str, Any]:
        """Where the loader is after a step that was planned lately."""

    def micro_batches(self, plan: StepPlan, *, dp_rank: int, dp_size: int, reads: Reads) -> list[MicroBatch]:
        """The micro-batches of one replica in a planned batch."""


class ShareReader:
    """Plans and reads one rank's share; each batch is planned once."""

    def __init__(self, config: Config, loader: PlanReader, share: Share) -> None:
        self._loader = loader
        self._share = share
        self.training, self.heldout = _vision_of(config, loader, share)
        """Vision items of training steps, and of evaluations."""

    def step(self, plan: StepPlan) -> HostInputs:
        """This rank's share of a planned training step."""
        return replace(self._read(plan, self.training), state_after=self._loader.state_after(plan))

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None) -> HostInputs:
        """The same of the first `num_sequences` held-out sequences; see `DataLoader.plan_evaluation`."""
        return self._read(self._loader.plan_evaluation(num_sequences, shuffle_media_seed), self.heldout)

    def _read(self, plan: StepPlan, vision: VisionSource) -> HostInputs:
        # 1. Items for the encoder, which decide the order in which micro-batches run.
        found, share = vision.read(plan), self._share
        batches = self._loader.micro_batches(
            plan, dp_rank=share.dp_rank, dp_size=share.dp_size, reads=share.reads
        )
        stacked = stack([batches[number] for number in found.order])
        # 2. What other ranks have to learn of: all of items, which any rank may encode, and of words the
        #    other stages of this replica.
        items = [
            Failure(each.replica, each.micro_batch, each.item, None, each.sample, each.reason)
            for each in found.failures
        ]
        failures = (*items, *self._own_failures(stacked))
        return HostInputs(plan.sizes(), stacked, found.work, failures, plan.served(), {})

    def _own_failures(self, batches: StepBatches) -> list[Failure]:
        """What was met in this replica's micro-batches, and is counted already."""
        found = []
        for number, documents in enumerate(batches.documents):
            at = self._share.dp_rank, number
            found += [Failure(*at, item, None, "", "") for item in documents.failed_items]
            found += [Failure(*at, None, document, "", "") for document in documents.unreadable]
        return found


def _vision_of(config: Config, loader: PlanReader, share: Share) -> tuple[VisionSource, VisionSource]:
    """What plans and reads vision items, in training and in evaluations, which encode upfront."""
    size = config.train.micro_batch_size
    if config.dep.mode is DepMode.coupled:
        nothing = NoVision(size * share.dp_size)
        return nothing, nothing

    def reader(planner: VisionPlanner) -> VisionReader:
        return VisionReader(
            loader.reading,
            loader.sources,
            planner,
            vision=config.model.vision,
            micro_batch_size=size,
            seq_len=config.train.seq_len,
            rank=share.rank,
            replica=share.dp_rank,
            num_replicas=share.dp_size,
            cp=config.parallelism.cp,
        )

    upfront = reader(UpfrontPlanner(config))
    if config.dep.schedule is DepSchedule.upfront:
        return upfront, upfront
    return reader(BubblePlanners(config, share.rank)), upfront
