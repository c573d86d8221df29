"""Who is in whose process groups, by arithmetic of its own.

Ranks are numbered stage by stage: the data-parallel ranks of a pipeline stage are neighbours, and within a
stage so are the ranks that share a layer's experts (megatron-core's order tp-cp-ep-dp-pp).
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """Ranks of the job, pipeline stages, and ranks that share the experts of a layer."""

    world: int
    pp: int
    ep: int

    @property
    def dp(self) -> int:
        """Ranks of a stage."""
        return self.world // self.pp


def pipeline(rank: int, sizes: Sizes) -> tuple[int, ...]:
    """Ranks in the same place of every stage."""
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


KINDS: dict[str, tuple[str, Callable[[int, Sizes], tuple[int, ...]]]] = {
    "pp": ("PIPELINE_MODEL_PARALLEL_GROUP", pipeline),
    "dp": ("DATA_PARALLEL_GROUP", stage),
    "dp_cp": ("DATA_PARALLEL_GROUP_WITH_CP", stage),
    "intra_dp_cp": ("DATA_PARALLEL_GROUP_WITH_CP", stage),
    "ep": ("EXPERT_MODEL_PARALLEL_GROUP", expert_sharers),
    "expt_dp": ("EXPERT_DATA_PARALLEL_GROUP", expert_replicas),
    "intra_expt_dp": ("EXPERT_DATA_PARALLEL_GROUP", expert_replicas),
}
"""Name in megatron-core's collection -> (its description of the kind, the members of a rank's group)."""
