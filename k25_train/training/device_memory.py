"""How much of its device each rank has used, next to what was planned.

torch's allocator counts what it has handed out (allocated) and what it holds for that (reserved). Their peaks
of a step are reduced over all ranks with one collective, so that every row of the metrics has those of the
worst rank. What CUDA and NCCL take is in neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from k25_train.config.schema import Config
from k25_train.errors import TrainingError
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.memory.verdict import judge_memory
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.units import GB
from parallel.host.upload import upload
from parallel.topology import Topology

TOLERANCE = 0.1
"""Share of the planned memory by which a rank may differ from it without a warning."""
LEAST_DIFFERENCE_BYTES = GB
"""A smaller difference needs no warning: a shrunk model takes little next to workspaces of kernels."""
RANK_BITS = 16
"""A figure and its rank are reduced as one integer; the figure counts `UNIT_BYTES` or millionths."""
UNIT_BYTES = 1024
MILLIONTHS = 10**6
MOST_RATIO = 1000.0
"""Of what is used to what is planned: the least ratio is the most of what this leaves."""


class AllocatorCounters(Protocol):
    """What is read of `torch.cuda`."""

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        """Count peaks from now on."""

    def max_memory_allocated(self, device: torch.device) -> int:
        """The most bytes of tensors at a time."""

    def max_memory_reserved(self, device: torch.device) -> int:
        """The most bytes that the allocator held at a time."""


@dataclass(frozen=True, slots=True)
class NoMemoryFigures:
    """Those of a device whose memory is not its own, which has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFigures:
    """The device memory of a step."""

    peak_allocated_bytes: int
    """The most bytes of tensors at a time, on the rank with the most."""
    peak_reserved_bytes: int
    """The most bytes that torch's allocator held at a time, on the rank with the most."""
    planned_bytes: int
    """Bytes of tensors that the plan has for the rank with the most allocated."""
    rank: int
    """The rank with the most allocated."""


class NoDeviceMemory:
    """Does nothing: the CPU's memory is the host's."""

    def start_step(self) -> None:
        """Do nothing."""

    def finish_step(self) -> NoMemoryFigures:
        """No figures."""
        return NoMemoryFigures()

    def warning(self) -> str:
        """Nothing to warn of."""
        return ""

    def told(self) -> str:
        """Nothing to tell."""
        return ""


class DeviceMemory:
    """Counts this rank's device memory step by step."""

    def __init__(
        self,
        planned_bytes: Sequence[int],
        stage_of_rank: Sequence[int],
        rank: int,
        device: torch.device,
        counters: AllocatorCounters = torch.cuda,
    ) -> None:
        """
        Args:
            planned_bytes: [stage] -> what its ranks' tensors take at most in a step.
            stage_of_rank: [rank] -> its stage.
            rank: this one.
            device: whose memory is counted.
            counters: the allocator's.
        """
        self._planned = planned_bytes
        self._stage_of_rank = stage_of_rank
        self._rank, self._device, self._counters = rank, device, counters
        self._off: tuple[float, int] = (1.0, 0)
        self._has_warned = False

    def start_step(self) -> None:
        """Count peaks from now on."""
        self._counters.reset_peak_memory_stats(self._device)

    def finish_step(self) -> MemoryFigures:
        """The figures of the step over all ranks. Called by every rank, when its work has been waited for."""
        # 1. This rank's peaks, and how they compare with its plan, each with the rank.
        allocated = self._counters.max_memory_allocated(self._device)
        reserved = self._counters.max_memory_reserved(self._device)
        ratio = min(allocated / self._of_rank(self._rank), MOST_RATIO)
        figures = [allocated // UNIT_BYTES, reserved // UNIT_BYTES]
        figures += [round(each * MILLIONTHS) for each in (ratio, MOST_RATIO - ratio)]
        packed = upload(torch.tensor([(each << RANK_BITS) + self._rank for each in figures]), self._device)
        # 2. The largest of each, over all ranks.
        dist.all_reduce(packed, dist.ReduceOp.MAX)
        (most, where), (held, _), (over, over_at), (under, under_at) = (
            divmod(each, 1 << RANK_BITS) for each in packed.tolist()
        )
        # 3. The rank that is furthest from its plan.
        largest, smallest = over / MILLIONTHS, MOST_RATIO - under / MILLIONTHS
        is_over = largest - 1 >= 1 - smallest
        self._off = (largest, over_at) if is_over else (smallest, under_at)
        return MemoryFigures(
            peak_allocated_bytes=most * UNIT_BYTES,
            peak_reserved_bytes=held * UNIT_BYTES,
            planned_bytes=self._of_rank(where),
            rank=where,
        )

    def warning(self) -> str:
        """What to say of the rank that differs the most from its plan, once in a run; empty if none does."""
        ratio, rank = self._off
        off, planned = abs(ratio - 1), self._of_rank(rank) / GB
        if self._has_warned or off <= TOLERANCE or off * planned * GB <= LEAST_DIFFERENCE_BYTES:
            return ""
        self._has_warned = True
        what = (
            f"rank {rank} (stage {self._stage_of_rank[rank]}) had {ratio * planned:.2f} GB of tensors at its "
        )
        what += f"peak, {off:.0%} {'more' if ratio > 1 else 'less'} than the {planned:.2f} planned; "
        if ratio < 1:
            return what + "the plan is an upper bound, and room may be left for fewer offloaded activations"
        return what + (
            "look for experts with more tokens than others, longer documents or larger images, and compare "
            "the items of `python -m k25_train.plan … --activations`"
        )

    def told(self) -> str:
        """What this rank has used and what is planned, for an error."""
        allocated = self._counters.max_memory_allocated(self._device) / GB
        reserved = self._counters.max_memory_reserved(self._device) / GB
        return (
            f"stage {self._stage_of_rank[self._rank]}: {allocated:.2f} GB of tensors at the peak and "
            f"{reserved:.2f} held by the allocator; {self._of_rank(self._rank) / GB:.2f} are planned"
        )

    def _of_rank(self, rank: int) -> int:
        return max(self._planned[self._stage_of_rank[rank]], 1)


def build_device_memory(pipeline: PipelinePlan, topology: Topology) -> DeviceMemory | NoDeviceMemory:
    """What counts this rank's device memory; nothing where the device is the CPU."""
    if topology.device.type != "cuda":
        return NoDeviceMemory()
    planned = [memory.tensors for memory in stage_memories(pipeline)]
    # megatron-core numbers ranks stage by stage.
    stages = [rank // topology.stage_size for rank in range(topology.world_size)]
    counters: Any = torch.cuda
    return DeviceMemory(planned, stages, topology.rank, topology.device, counters)


def out_of_memory(error: torch.OutOfMemoryError, told: str, config: Config) -> TrainingError:
    """The error of a rank whose device is out of memory: what was used and planned, and what to do.

    Args:
        error: torch's.
        told: `DeviceMemory.told`.
        config: the run's.
    """
    remedy = (
        "Where more is used than planned, experts may have got more tokens than others: offload more, as by "
        "activation.moe.swiglu_input=fp8+offload; where less is, other programs may be on the GPU"
    )
    if config.cluster.gpu_memory_gb is not None:
        verdict = judge_memory(plan_pipeline(config))
        if verdict.remedy is not None and verdict.remedy.overrides and verdict.remedy.fits:
            changes = " ".join(verdict.remedy.overrides)
            remedy = f"By the plan it is {verdict.fit.value!r}; with {changes} it would fit"
    return TrainingError(
        f"the device is out of memory, {told}. {remedy}; then start again: the run goes on from its newest "
        f"checkpoint ({error})"
    )
