"""Whether a configuration fits its devices and hosts, with which margin, and what would help; torch-free."""

from dataclasses import dataclass

from k25_train.plan.memory.remedies import Remedy, StepCost, find_remedy
from k25_train.plan.memory.room import Fit, Room, room_of
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.step_cost import gpu_seconds
from k25_train.plan.pipeline import PipelinePlan
from k25_train.units import GB, GIB

__all__ = ["Fit", "MemoryVerdict", "Remedy", "StepCost", "judge_memory"]


@dataclass(frozen=True, kw_only=True)
class MemoryVerdict:
    """Device and host memory, next to what there is."""

    fit: Fit
    """The worse of device and host."""
    stage: int
    """Stage whose ranks have the fullest devices."""
    allocated_bytes: float
    """Peak of tensors on such a device, as torch's allocator counts them."""
    device_bytes: float
    """Everything on it: tensors, the allocator's slack, CUDA, NCCL."""
    limit_bytes: float | None
    """What the device has; None where the device is the CPU, which always fits."""
    load_bytes: float
    """Peak of a device while a run is resumed from a checkpoint."""
    node_bytes: float
    """Host memory of the fullest node."""
    node_limit_bytes: float
    """What a node has."""
    remedy: Remedy | None
    """The cheapest change found that makes it fit; None if it fits already, or if none was looked for."""
    memories: tuple[StageMemory, ...] = ()
    """[stage] -> what its ranks hold, of which the above follows."""

    @property
    def margin_bytes(self) -> float | None:
        """Device memory that is left; negative if there is too little."""
        return None if self.limit_bytes is None else self.limit_bytes - self.device_bytes


def judge_memory(
    pipeline: PipelinePlan, *, seeks_remedy: bool = True, cost: StepCost = gpu_seconds
) -> MemoryVerdict:
    """Whether a plan fits, on devices and in hosts.

    Args:
        pipeline: the plan.
        seeks_remedy: whether to try what would make it fit if it does not, or is tight.
        cost: what a step of a plan costs, by which the cheapest change is chosen; an estimate by default.
    """
    room = room_of(pipeline)
    remedy = find_remedy(pipeline, room, cost) if seeks_remedy and room.fit is not Fit.fits else None
    return _verdict(pipeline, room, remedy)


def _verdict(pipeline: PipelinePlan, room: Room, remedy: Remedy | None) -> MemoryVerdict:
    cluster, worst = pipeline.config.cluster, room.worst
    return MemoryVerdict(
        fit=room.fit,
        stage=worst.stage,
        allocated_bytes=worst.tensors,
        device_bytes=worst.device,
        limit_bytes=None if cluster.gpu_memory_gb is None else cluster.gpu_memory_gb * GB,
        load_bytes=max(each.loading for each in room.memories),
        node_bytes=room.node.total,
        node_limit_bytes=cluster.host_memory_gib * GIB,
        remedy=remedy,
        memories=tuple(room.memories),
    )
