"""How many exchanges of features a rank has in flight when the tower runs in the pipeline's idle time.
Pure; standard library only.

A rank posts the features of a micro-batch when it has encoded its share and the first stage is near it, and
gradients when the plan has them; each waits on the GPU, in order, until its other end has come that far. Only
the first kernel of a communicator occupies SMs, the others queue behind it. CUDA holds about a thousand
launches for a stream; beyond that the next launch blocks the host, which then can no longer start what others
wait for.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from parallel.dep.bubbles import Placement
from parallel.dep.program import receiving_times_s, sending_times_s
from parallel.pipeline.timeline import Timeline

LAUNCHES = 1000
"""About what CUDA holds for a stream before a launch blocks. Source: measured by others, not documented."""


@dataclass(slots=True)
class _Exchange:
    """One kind of exchange."""

    posted_s: list[dict[int, float]]
    """[micro-batch][rank] -> when the rank posts it."""
    peers: list[dict[int, set[int]]]
    """[micro-batch][rank] -> ranks at the other end."""
    free_s: dict[int, float] = field(default_factory=dict)
    """Rank -> when all that it has posted before is done."""

    def in_flight(self) -> dict[int, list[tuple[float, float]]]:
        """Rank -> when each of its exchanges is posted, and done."""
        found: dict[int, list[tuple[float, float]]] = {}
        for posted_s, peers in zip(self.posted_s, self.peers, strict=True):
            starts_s = {rank: max(time_s, self.free_s.get(rank, 0.0)) for rank, time_s in posted_s.items()}
            for rank, others in peers.items():
                done_s = max(starts_s[rank], *(starts_s[other] for other in others))
                self.free_s[rank] = done_s
                found.setdefault(rank, []).append((posted_s[rank], done_s))
        return found


def most_in_flight(
    items: Sequence[tuple[int, int]], placements: Sequence[Placement], text: Timeline, num_replicas: int
) -> tuple[int, int]:
    """Most exchanges of features, and of their gradients, that any rank has in flight at a time.

    Args:
        items: [item] -> (replica, micro-batch).
        placements: [item] -> where it is encoded.
        text: one replica's pipeline, by which items were placed.
        num_replicas: data-parallel size of the job.
    """
    peers = _peers(items, placements, len(text.feature_deadlines_s()))
    features = _Exchange(_features_posted_s(items, placements, text, num_replicas, peers), peers)
    gradients = _Exchange(_gradients_posted_s(text, num_replicas, peers), peers)
    features_most, gradients_most = (
        max((_most(each) for each in exchange.in_flight().values()), default=0)
        for exchange in (features, gradients)
    )
    return features_most, gradients_most


def _peers(
    items: Sequence[tuple[int, int]], placements: Sequence[Placement], num_micro_batches: int
) -> list[dict[int, set[int]]]:
    found: list[dict[int, set[int]]] = [{} for _ in range(num_micro_batches)]
    for (replica, micro_batch), placement in zip(items, placements, strict=True):
        # The first stage of a replica is the rank of that number.
        if placement.rank != replica:
            found[micro_batch].setdefault(placement.rank, set()).add(replica)
            found[micro_batch].setdefault(replica, set()).add(placement.rank)
    return found


def _features_posted_s(
    items: Sequence[tuple[int, int]],
    placements: Sequence[Placement],
    text: Timeline,
    num_replicas: int,
    peers: Sequence[Mapping[int, set[int]]],
) -> list[dict[int, float]]:
    # 1. When a rank has encoded its share of each micro-batch.
    encoded_s: list[dict[int, float]] = [{} for _ in peers]
    for (_, micro_batch), placement in zip(items, placements, strict=True):
        time_s = _start_s(text, placement.rank // num_replicas, placement.forward[-1][0])
        known_s = encoded_s[micro_batch]
        known_s[placement.rank] = max(known_s.get(placement.rank, 0.0), time_s)
    # 2. It also waits for its turn. All post in one order.
    latest_s: dict[int, float] = {}
    posted_s = []
    turns_s = zip(receiving_times_s(text), sending_times_s(text), strict=True)
    for (receiving_s, sending_s), encoded, own in zip(turns_s, encoded_s, peers, strict=True):
        for rank in own.keys() | encoded.keys():
            stage = rank // num_replicas
            turn_s = _next_s(text, stage, sending_s) if stage else receiving_s
            ready_s = max(encoded.get(rank, 0.0), turn_s)
            latest_s[rank] = max(ready_s, latest_s.get(rank, 0.0))
        posted_s.append({rank: latest_s[rank] for rank in own})
    return posted_s


def _gradients_posted_s(
    text: Timeline, num_replicas: int, peers: Sequence[Mapping[int, set[int]]]
) -> list[dict[int, float]]:
    # All take part from their first pass after the first stage has the gradient; backward ends in order.
    times_s = list(accumulate(text.gradient_times_s(), max))
    return [
        {rank: _next_s(text, rank // num_replicas, time_s) for rank in own}
        for time_s, own in zip(times_s, peers, strict=True)
    ]


def _start_s(text: Timeline, stage: int, position: int) -> float:
    starts_s = text.starts_s[stage]
    return starts_s[position] if position < len(starts_s) else text.makespan_s


def _next_s(text: Timeline, stage: int, time_s: float) -> float:
    starts_s = text.starts_s[stage]
    return _start_s(text, stage, bisect_left(starts_s, time_s))


def _most(in_flight: Iterable[tuple[float, float]]) -> int:
    """Most of these intervals that hold one moment, those that end as they begin included."""
    edges = [edge for start_s, end_s in in_flight for edge in ((start_s, 0), (end_s, 1))]
    most = number = 0
    for _, is_end in sorted(edges):
        number += -1 if is_end else 1
        most = max(most, number)
    return most
