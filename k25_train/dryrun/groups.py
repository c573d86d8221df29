"""Compares the process groups that ranks formed with those that `group_members` expects."""

from collections.abc import Sequence

from k25_train.dryrun.group_members import KINDS, Sizes, everyone
from k25_train.dryrun.rank import BuiltRank
from parallel.config import Problem

ENCODER_GROUPS = ("VISION_GROUP", "VISION_FEATURES_GROUP")
"""Descriptions of the decoupled encoder's groups, each of all ranks; gradients of features may have one,
too."""

REMEDY = (
    "the order of ranks has changed, in parallel/topology.py or in megatron-core: correct it there, or here "
    "and in every place that reads it"
)


def check_groups(ranks: Sequence[BuiltRank], sizes: Sizes) -> list[Problem]:
    """Groups of the built ranks, and all groups of the world, that have other members than they should."""
    found = [problem for built in ranks for problem in _of_rank(built, sizes)]
    return found + _of_world(ranks, sizes)


def _of_rank(built: BuiltRank, sizes: Sizes) -> list[Problem]:
    topology = built.topology
    found = [
        Problem(f"rank {topology.rank}: {kind} group", built.groups[kind], f"must be {members}", REMEDY)
        for kind, (_, members_of) in KINDS.items()
        if built.groups[kind] != (members := members_of(topology.rank, sizes))
    ]
    positions = {
        "pp": topology.pp_rank,
        "dp": topology.dp_rank,
        "cp": topology.cp_rank,
        "ep": topology.ep_rank,
    }
    for kind, position in positions.items():
        expected = KINDS[kind].members_of(topology.rank, sizes).index(topology.rank)
        if position != expected:
            found.append(
                Problem(f"rank {topology.rank}: {kind} rank", position, f"must be {expected}", REMEDY)
            )
    return found


def _of_world(ranks: Sequence[BuiltRank], sizes: Sizes) -> list[Problem]:
    found = []
    formed = ranks[0].groups_of_world
    for built in ranks[1:]:
        if built.groups_of_world != formed:
            # Forming a group is collective: ranks that form others wait for each other for ever.
            rule = f"must be those that rank {ranks[0].topology.rank} forms, in the same order"
            found.append(Problem(f"groups that rank {built.topology.rank} forms", None, rule, REMEDY))
    topology = ranks[0].topology
    own = ("VISION_FEATURE_GRADIENTS_GROUP",) * (topology.features is not topology.feature_gradients)
    kinds = dict(KINDS.values()) | dict.fromkeys((*ENCODER_GROUPS, *own), everyone)
    for description, members_of in kinds.items():
        expected = {members_of(rank, sizes) for rank in range(sizes.world)}
        groups = formed.get(description, [])
        if len(groups) != len(expected) or set(groups) != expected:
            wrong = sorted(set(groups) ^ expected)[:4]
            rule = f"must be {len(expected)} groups of {len(next(iter(expected)))} ranks; differing: {wrong}"
            found.append(Problem(description, f"{len(groups)} groups", rule, REMEDY))
    return found
