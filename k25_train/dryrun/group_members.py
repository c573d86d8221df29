"""The members of every process group, computed from the sizes alone, without megatron-core.

Ranks are numbered stage by stage: the ranks of a pipeline stage are neighbours, and within a stage so are
those that share sequences, and those that share a layer's experts (megatron-core's order tp-cp-ep-dp-pp).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a job's layout."""

    world: int
    """Ranks of the job."""
    pp: int
    """Pipeline stages."""
    ep: int
    """Ranks that share the experts of a layer."""
    cp: int
    """Ranks that share sequences."""

    @property
    def of_stage(self) -> int:
        """Ranks of a stage."""
        return self.world // self.pp


def pipeline(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the same pipeline, one per stage."""
    return tuple(range(rank % sizes.of_stage, sizes.world, sizes.of_stage))


def stage(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the same stage, over which shared weights are replicated."""
    first = rank // sizes.of_stage * sizes.of_stage
    return tuple(range(first, first + sizes.of_stage))


def sequence_sharers(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks that hold tokens of the same sequences."""
    first = rank // sizes.cp * sizes.cp
    return tuple(range(first, first + sizes.cp))


def replicas(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the stage with the same place in each replica; their sequences differ."""
    first = rank // sizes.of_stage * sizes.of_stage
    return tuple(range(first + rank % sizes.cp, first + sizes.of_stage, sizes.cp))


def expert_sharers(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks that share the experts of each layer among them."""
    first = rank // sizes.ep * sizes.ep
    return tuple(range(first, first + sizes.ep))


def expert_replicas(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the stage that hold the same experts."""
    first = rank // sizes.of_stage * sizes.of_stage
    return tuple(range(first + rank % sizes.of_stage % sizes.ep, first + sizes.of_stage, sizes.ep))


def everyone(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """All ranks of the job."""
    return tuple(range(sizes.world))


class GroupKind(NamedTuple):
    """One kind of process group."""

    description: str
    """megatron-core's description of the kind."""
    members_of: Callable[[int, Sizes], tuple[int, ...]]
    """From a rank and the sizes to the members of its group, as global ranks."""


KINDS: dict[str, GroupKind] = {
    "pp": GroupKind("PIPELINE_MODEL_PARALLEL_GROUP", pipeline),
    "cp": GroupKind("CONTEXT_PARALLEL_GROUP", sequence_sharers),
    "dp": GroupKind("DATA_PARALLEL_GROUP", replicas),
    "dp_cp": GroupKind("DATA_PARALLEL_GROUP_WITH_CP", stage),
    "intra_dp_cp": GroupKind("DATA_PARALLEL_GROUP_WITH_CP", stage),
    "tp_dp_cp": GroupKind("TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP", stage),
    "ep": GroupKind("EXPERT_MODEL_PARALLEL_GROUP", expert_sharers),
    "expt_dp": GroupKind("EXPERT_DATA_PARALLEL_GROUP", expert_replicas),
    "intra_expt_dp": GroupKind("EXPERT_DATA_PARALLEL_GROUP", expert_replicas),
}
"""Name in megatron-core's collection of groups -> kind of group."""
