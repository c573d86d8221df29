"""Whether devices and hosts have room for a plan, and how much must be left of them; torch-free."""

from dataclasses import dataclass
from enum import Enum

from k25_train.plan.memory.node import NodeMemory, fullest_node, node_memories
from k25_train.plan.memory.stage import fullest, room_bytes, stage_memories, with_imbalance
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.pipeline import PipelinePlan
from k25_train.units import GB, GIB

MARGIN_SHARE = 0.05
"""Share of a device, and of a node's memory, that a plan should leave. Source: near capacity the allocator
returns memory and asks for it again. With 98% of an H100 in use a step took six times as long (Megatron-LM
pull request 6429); at 96% nodes failed at times (torchtitan issue 1789)."""
MARGIN_IMBALANCE = 1.2
"""How many times their even share of tokens a rank's experts may get in every pass, and it still fits.
Source: natural routing cost up to 20% next to balanced routing in the one pair that was published
(Megatron-MoE-ModelZoo, Qwen3-235B, 16K)."""


class Fit(Enum):
    """How a configuration fits."""

    fits = "fits"
    """With room for experts that get more tokens than others, and for what no plan knows."""
    tight = "tight"
    """With less room than that: the allocator may have to return memory, which is slow, or run out of it."""
    does_not_fit = "does not fit"
    """Not even if all goes as planned."""

    @property
    def is_possible(self) -> bool:
        """Whether it may run."""
        return self is not Fit.does_not_fit


ORDER = tuple(Fit)
"""From the best to the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a plan leaves of its fullest device and node."""

    memories: list[StageMemory]
    """[stage] -> what its ranks hold."""
    worst: StageMemory
    """The stage with the fullest devices."""
    node: NodeMemory
    """The fullest node."""
    device_left: float | None
    """Bytes that the plan leaves of the fullest device; None where the device is the CPU."""
    device_wanted: float
    """Bytes that it should leave: `MARGIN_SHARE`, or what experts take with `MARGIN_IMBALANCE`."""
    node_left: float
    """Bytes that the plan leaves of the fullest node's memory."""
    node_wanted: float
    """Bytes that it should leave."""

    @property
    def of_device(self) -> Fit:
        """How it fits devices; the CPU has no memory of its own."""
        return Fit.fits if self.device_left is None else fit_of(self.device_left, self.device_wanted)

    @property
    def of_node(self) -> Fit:
        """How it fits nodes; where the device is the CPU nothing is judged: those are for trials."""
        return Fit.fits if self.device_left is None else fit_of(self.node_left, self.node_wanted)

    @property
    def fit(self) -> Fit:
        """The worse of both."""
        return max(self.of_device, self.of_node, key=ORDER.index)

    @property
    def shortage(self) -> float:
        """Bytes that are missing of what should be left, of devices and nodes together; 0 if it fits."""
        if self.device_left is None:
            return 0.0
        of_device = max(self.device_wanted - self.device_left, 0.0)
        return of_device + max(self.node_wanted - self.node_left, 0.0)


def fit_of(left: float, wanted: float) -> Fit:
    """How something fits that leaves so much of what there is, and should leave so much."""
    if left < 0:
        return Fit.does_not_fit
    return Fit.fits if left >= wanted else Fit.tight


def room_of(pipeline: PipelinePlan) -> Room:
    """What a plan leaves."""
    config, memories = pipeline.config, stage_memories(pipeline)
    worst, node = fullest(memories), fullest_node(node_memories(pipeline, memories))
    limit, node_limit = config.cluster.gpu_memory_gb, config.cluster.host_memory_gib * GIB
    return Room(
        memories=memories,
        worst=worst,
        node=node,
        device_left=None if limit is None else room_bytes(config, worst),
        device_wanted=0.0
        if limit is None
        else max(MARGIN_SHARE * limit * GB, _of_imbalance(pipeline, worst)),
        node_left=node_limit - node.total,
        node_wanted=MARGIN_SHARE * node_limit,
    )


def _of_imbalance(pipeline: PipelinePlan, worst: StageMemory) -> float:
    """What more the fullest stage takes if its experts get `MARGIN_IMBALANCE` times their share."""
    if pipeline.assumptions.expert_imbalance >= MARGIN_IMBALANCE:
        return 0.0
    return with_imbalance(pipeline.stages[worst.stage], worst, MARGIN_IMBALANCE).device - worst.device
