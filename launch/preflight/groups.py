"""Which connections are measured: the configuration's groups, split into rounds of disjoint pairs; pure.

Ranks are in megatron-core's order: ranks of one pipeline stage are consecutive, and so are ranks that share
sequences, and those that share the experts of a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import ranks_of_stage

Pair = tuple[int, int]


class Exchange(Enum):
    """Kinds of traffic between ranks in training; each is measured over its own pairs."""

    experts = "experts"
    """Tokens, all to all, within an expert-parallel group."""
    contexts = "contexts"
    """Latents, around the ring of ranks that share sequences."""
    pipeline = "pipeline"
    """Activations and gradients, between neighbouring stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Pairs that exchange data at the same time; no rank is in two of them."""

    exchange: Exchange
    pairs: tuple[Pair, ...]

    def partner(self, rank: int) -> int | None:
        """The rank that `rank` exchanges data with; None if it is idle in this round."""
        for first, second in self.pairs:
            if rank in (first, second):
                return second if rank == first else first
        return None


def expert_groups(world_size: int, ep: int) -> list[tuple[int, ...]]:
    """Global ranks of every expert-parallel group."""
    return [tuple(range(first, first + ep)) for first in range(0, world_size, ep)]


def context_groups(world_size: int, cp: int) -> list[tuple[int, ...]]:
    """Global ranks of every group that shares sequences."""
    return [tuple(range(first, first + cp)) for first in range(0, world_size, cp)]


def pipeline_groups(world_size: int, pp: int) -> list[tuple[int, ...]]:
    """Global ranks of every pipeline, by stage."""
    of_stage = ranks_of_stage(world_size, pp)
    return [tuple(range(first, world_size, of_stage)) for first in range(of_stage)]


def plan_rounds(world_size: int, *, pp: int, ep: int, cp: int) -> list[Round]:
    """Rounds in which every pair of an expert-parallel group, of neighbours among those that share sequences,
    and of neighbouring stages, is measured once.

    The last and the first stage are neighbours, too: with virtual stages, activations go from one to the
    other.
    """
    experts = [list(_all_pairs(group)) for group in expert_groups(world_size, ep)]
    contexts = [list(ring_rounds(group)) for group in context_groups(world_size, cp)]
    pipelines = [list(ring_rounds(group)) for group in pipeline_groups(world_size, pp)]
    rounds = []
    for exchange, by_group in (
        (Exchange.experts, experts),
        (Exchange.contexts, contexts),
        (Exchange.pipeline, pipelines),
    ):
        # All groups of a kind have the same number of rounds, and their rounds run at the same time.
        for concurrent in zip(*by_group, strict=True):
            pairs = tuple(pair for pairs in concurrent for pair in pairs)
            rounds.append(Round(exchange=exchange, pairs=pairs))
    return rounds


def _all_pairs(group: Sequence[int]) -> Iterator[list[Pair]]:
    """Rounds of a round-robin tournament: the first rank stays, the others rotate (the circle method)."""
    if len(group) < 2:
        return
    # With an odd number of ranks, one is idle in each round.
    seats: list[int | None] = [*group, *([None] if len(group) % 2 else [])]
    for _ in range(len(seats) - 1):
        facing = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None]
        seats[1:] = [seats[-1], *seats[1:-1]]


def ring_rounds(group: Sequence[int]) -> Iterator[list[Pair]]:
    """Rounds of disjoint pairs over the connections of a ring; two members have a single connection."""
    if len(group) < 2:
        return
    links = [(group[i], group[(i + 1) % len(group)]) for i in range(len(group) if len(group) > 2 else 1)]
    last = [links.pop()] if len(links) % 2 and len(links) > 1 else []
    for pairs in (links[0::2], links[1::2], last):
        if pairs:
            yield [(min(pair), max(pair)) for pair in pairs]
