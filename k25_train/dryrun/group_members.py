"""The members of every process group, computed from the sizes alone, without megatron-core.

Ranks are numbered stage by stage: the data-parallel ranks of a pipeline stage are neighbours, and within a
stage so are the ranks that share a layer's experts (megatron-core's order tp-cp-ep-dp-pp).
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

    @property
    def dp(self) -> int:
        """Ranks of a stage."""
        return self.world // self.pp


def pipeline(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the same pipeline, one per stage."""
    return tuple(range(rank % sizes.dp, sizes.world, sizes.dp))


def stage(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the same stage, over which shared weights are replicated."""
    first = rank // sizes.dp * sizes.dp
    return tuple(range(first, first + sizes.dp))


def expert_sharers(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks that share the experts of each layer among them."""
    first = rank // sizes.ep * sizes.ep
    return tuple(range(first, first + sizes.ep))


def expert_replicas(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks of the stage that hold the same experts."""
    first = rank // sizes.dp * sizes.dp
    return tuple(range(first + rank % sizes.dp % sizes.ep, first + sizes.dp, sizes.ep))


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
    "dp": GroupKind("DATA_PARALLEL_GROUP", stage),
    "dp_cp": GroupKind("DATA_PARALLEL_GROUP_WITH_CP", stage),
    "intra_dp_cp": GroupKind("DATA_PARALLEL_GROUP_WITH_CP", stage),
    "ep": GroupKind("EXPERT_MODEL_PARALLEL_GROUP", expert_sharers),
    "expt_dp": GroupKind("EXPERT_DATA_PARALLEL_GROUP", expert_replicas),
    "intra_expt_dp": GroupKind("EXPERT_DATA_PARALLEL_GROUP", expert_replicas),
}
"""Name in megatron-core's collection of groups -> kind of group."""
