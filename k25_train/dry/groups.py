"""Who is in whose process groups, by arithmetic of its own, against the groups that were really formed.

Ranks are numbered stage by stage: the data-parallel ranks of a pipeline stage are neighbours, and within a
stage so are the ranks that share a layer's experts (megatron-core's order tp-cp-ep-dp-pp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.config import Problem

if TYPE_CHECKING:
    from k25_train.dry.rank import BuiltRank


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

OF_ENCODER = ("VISION_GROUP", "VISION_FEATURES_GROUP", "VISION_FEATURE_GRADIENTS_GROUP")
"""Descriptions of the decoupled encoder's groups, all of everyone."""

REMEDY = (
    "the order of ranks has changed, in parallel/topology.py or in megatron-core: correct it there, or here "
    "and in every place that reads it"
)


def check_groups(ranks: Sequence[BuiltRank], sizes: Sizes) -> list[Problem]:
    """Groups of the built ranks, and all groups of the world, that have other members than they should."""
    found = [problem for built in ranks for problem in _of_rank(built, sizes)]
    return found + _of_world(ranks, sizes)


def _of_rank(built: BuiltRank, sizes: Sizes) -> list[Problem]:
    place = built.topology
    found = [
        Problem(f"rank {place.rank}: {kind} group", built.groups[kind], f"must be {members}", REMEDY)
        for kind, (_, formula) in KINDS.items()
        if built.groups[kind] != (members := formula(place.rank, sizes))
    ]
    stands = {"pp": place.pp_rank, "dp": place.dp_rank, "ep": place.ep_rank}
    for kind, position in stands.items():
        expected = KINDS[kind][1](place.rank, sizes).index(place.rank)
        if position != expected:
            found.append(Problem(f"rank {place.rank}: {kind} rank", position, f"must be {expected}", REMEDY))
    return found


def _of_world(ranks: Sequence[BuiltRank], sizes: Sizes) -> list[Problem]:
    found = []
    formed = ranks[0].groups_of_world
    for built in ranks[1:]:
        if built.groups_of_world != formed:
            # Forming a group is collective: ranks that form others wait for each other for ever.
            rule = f"must be those that rank {ranks[0].topology.rank} forms, in the same order"
            found.append(Problem(f"groups that rank {built.topology.rank} forms", None, rule, REMEDY))
    kinds = dict(KINDS.values()) | dict.fromkeys(OF_ENCODER, everyone)
    for description, formula in kinds.items():
        expected = {formula(rank, sizes) for rank in range(sizes.world)}
        groups = formed.get(description, [])
        if len(groups) != len(expected) or set(groups) != expected:
            wrong = sorted(set(groups) ^ expected)[:4]
            rule = f"must be {len(expected)} groups of {len(next(iter(expected)))} ranks; differing: {wrong}"
            found.append(Problem(description, f"{len(groups)} groups", rule, REMEDY))
    return found
