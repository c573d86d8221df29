"""From the phases that all ranks recorded in one step to what each was doing when. Pure.

A rank is in several phases at once: `train > forward > all-to-all`. What began last says what it does, and
for a collective also the phase that it is called in. A coupled tower is part of the backbone's passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from parallel.watchdog.recorder import Span


class Kind(Enum):
    """What a rank can be doing; values are the legend's words."""

    vision_forward = "vision forward"
    forward = "backbone forward"
    backward = "backbone backward"
    forward_and_backward = "backbone forward and backward at once"
    vision_backward = "vision recompute and backward"
    optimizer = "optimizer"
    reading = "read data"
    features = "exchange of features"
    experts = "exchange among experts"
    contexts = "exchange of latents"
    pipeline = "wait for pipeline neighbour"
    collective = "gradients, weights, other collectives"
    other = "idle or not announced"


PASSES = (Kind.forward, Kind.backward, Kind.forward_and_backward)
COMPUTING = (Kind.vision_forward, *PASSES, Kind.vision_backward, Kind.optimizer)
_KINDS = {
    "vision forward": Kind.vision_forward,
    "forward": Kind.forward,
    "backward": Kind.backward,
    "forward and backward": Kind.forward_and_backward,
    "vision backward": Kind.vision_backward,
    "optimizer": Kind.optimizer,
    "read data": Kind.reading,
    "features": Kind.features,
    "feature gradients": Kind.features,
    "keys and values": Kind.features,
    "meet": Kind.features,
    "latents": Kind.contexts,
    "pipeline send/recv": Kind.pipeline,
    "pipeline send": Kind.pipeline,
    "pipeline recv": Kind.pipeline,
    "reduce gradients": Kind.collective,
    "gather parameters": Kind.collective,
}
"""Names of phases; of others, those with peers are collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """One rank's phases in a step, and its position in the layout."""

    rank: int
    """Global rank."""
    stage: int
    """Pipeline rank."""
    replica: int
    """Data-parallel rank."""
    node: str
    """Name of its machine: ranks of one share a clock."""
    ready_s: float
    """When it left the barrier before the step, by that clock."""
    spans: tuple[Span, ...]
    """Phases, in the order in which they ended."""

    @property
    def label(self) -> str:
        """Rank, stage and replica."""
        return f"rank {self.rank} · stage {self.stage} · replica {self.replica}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A time in which a rank did one thing."""

    kind: Kind
    start_s: float
    end_s: float


def aligned(records: Sequence[RankRecord]) -> list[RankRecord]:
    """Records, pipeline after pipeline, in seconds from the step's start.

    That is when the first rank of each node left the barrier before the step: clocks of nodes have different
    origins, and nodes leave a barrier at one time but for what a message takes.
    """
    starts_s: dict[str, float] = {}
    for record in records:
        starts_s[record.node] = min(record.ready_s, starts_s.get(record.node, record.ready_s))
    return [
        _shifted(record, starts_s[record.node])
        for record in sorted(records, key=lambda record: (record.replica, record.stage))
    ]


def _shifted(record: RankRecord, start_s: float) -> RankRecord:
    spans = (
        replace(span, start_s=span.start_s - start_s, end_s=span.end_s - start_s) for span in record.spans
    )
    return replace(record, ready_s=record.ready_s - start_s, spans=tuple(spans))


def step_s(records: Sequence[RankRecord]) -> float:
    """Seconds of the whole step, from aligned records."""
    return max((span.end_s for record in records for span in record.spans), default=0.0)


def segments(spans: Sequence[Span]) -> list[Segment]:
    """What a rank did from its first phase to its last, without overlap, in order of time."""
    return [
        Segment(kind_of(path), start_s, end_s) for start_s, end_s, path in _paths(spans) if end_s > start_s
    ]


def kind_of(path: Sequence[Span]) -> Kind:
    """What a rank does that is in these phases, the last one innermost."""
    communicates = False
    for span in reversed(path):
        kind = _KINDS.get(span.name)
        if kind is None:
            communicates = communicates or bool(span.peers)
        elif not communicates or kind in (Kind.features, Kind.contexts, Kind.pipeline):
            return kind
        else:
            return Kind.experts if kind in PASSES else Kind.collective
    return Kind.collective if communicates else Kind.other


def computing_share(spans: Sequence[Span], seconds: float) -> float:
    """Share of `seconds` in which a rank computed, whether or not others waited for it."""
    return sum(each.end_s - each.start_s for each in segments(spans) if each.kind in COMPUTING) / seconds


def in_order(spans: Sequence[Span]) -> list[Span]:
    """Spans as they began; a clock may be too coarse to separate a phase from the one that it is in."""
    return sorted(spans, key=lambda span: (span.start_s, span.depth))


def _paths(spans: Sequence[Span]) -> Iterator[tuple[float, float, list[Span]]]:
    """Start and end of each time in which the phases in flight stay the same, and these, innermost last.

    They need not end in the reverse of the order in which they began.
    """
    waiting = in_order(spans)[::-1]
    path: list[Span] = []
    now_s = waiting[-1].start_s if waiting else 0.0
    while waiting or path:
        if not path:
            now_s = waiting[-1].start_s
        while waiting and waiting[-1].start_s <= now_s:
            path.append(waiting.pop())
        until_s = min(span.end_s for span in path)
        if waiting:
            until_s = min(until_s, waiting[-1].start_s)
        yield now_s, until_s, path
        now_s = until_s
        path = [span for span in path if span.end_s > now_s]
