"""When each pass of a pipeline ran, and when its ranks were idle. Pure; standard library only.

Ranks are numbered as megatron-core does: rank = stage * num_replicas + replica.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from parallel.pipeline.schedule import Pass


class Work(NamedTuple):
    """Forward of the tower over some items of one micro-batch, or recomputation and backward.

    The first chunk of the micro-batch waits for all its forward work; its backward work waits for the first
    chunk's backward. Any rank may do the work.
    """

    is_forward: bool
    """Whether it is forward; otherwise recomputation and backward."""
    replica: int
    """Replica that owns the micro-batch."""
    micro_batch: int
    """Number of the micro-batch within the replica."""
    seconds: float
    """Duration."""


WorkBefore = Mapping[tuple[int, int], Sequence[Work]]
"""(rank, position in its list of passes) -> work that the rank does, in order, once it has run all passes
before that position. The position after the last pass is the length of the list."""


class Slot(NamedTuple):
    """A time in which a rank is idle."""

    position: int
    """Position of the pass that the rank waits for; the number of its passes if it has run them all."""
    start_s: float
    """Seconds from the start of the step."""
    end_s: float
    """Seconds from the start of the step."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end_s - self.start_s


class Durations(Protocol):
    """How long passes take. Chunks are counted in pipeline order (chunk = vp_stage * pp + stage)."""

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole pipeline."""

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        """Seconds of a pass that runs by itself."""

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        """Seconds of a forward and a backward pass that run overlapped, as one."""

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        """Seconds from the end of a pass, or of two, until the other stage has what it gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSeconds:
    """`Durations` of chunks whose overlapped passes take as long as one after the other."""

    forward_s: tuple[float, ...]
    """[chunk] -> seconds of a forward pass."""
    backward_s: tuple[float, ...]
    """[chunk] -> seconds of a backward pass."""

    @property
    def num_chunks(self) -> int:
        """See `Durations`."""
        return len(self.forward_s)

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        """See `Durations`."""
        return self.forward_s[chunk] if is_forward else self.backward_s[chunk]

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        """See `Durations`."""
        return self.forward_s[forward_chunk] + self.backward_s[backward_chunk]

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        """See `Durations`: none."""
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When everything ran, in seconds from the start of the step."""

    schedules: tuple[tuple[Pass, ...], ...]
    """[stage] -> its passes."""
    num_replicas: int
    """Number of pipelines that ran next to each other."""
    starts_s: tuple[list[float], ...]
    """[rank][position] -> start of the pass."""
    ends_s: tuple[list[float], ...]
    """[rank][position] -> end of the pass."""
    work_starts_s: dict[tuple[int, int], list[float]]
    """(rank, position) -> start of each work done before that pass."""
    rank_ends_s: list[float]
    """[rank] -> end of everything that it does."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a replica."""
        return sum(each.is_forward and each.vp_stage == 0 for each in self.schedules[0])

    @property
    def makespan_s(self) -> float:
        """When the last rank is done."""
        return max(self.rank_ends_s)

    def slots(self, rank: int) -> list[Slot]:
        """Idle times of a rank without other work, in order, including the one after its last pass."""
        found, free_s = [], 0.0
        for position, start_s in enumerate(self.starts_s[rank]):
            if start_s > free_s:
                found.append(Slot(position, free_s, start_s))
            free_s = self.ends_s[rank][position]
        if self.makespan_s > free_s:
            found.append(Slot(len(self.starts_s[rank]), free_s, self.makespan_s))
        return found

    def feature_deadlines_s(self) -> list[float]:
        """[micro-batch] -> when the first replica's first chunk starts its forward pass."""
        return self._of_first_chunk(self.starts_s[0], is_forward=True)

    def gradient_times_s(self) -> list[float]:
        """[micro-batch] -> when the first replica's first chunk ends its backward pass."""
        return self._of_first_chunk(self.ends_s[0], is_forward=False)

    def _of_first_chunk(self, times_s: Sequence[float], *, is_forward: bool) -> list[float]:
        found = [
            (each.micro_batch, time_s)
            for each, time_s in zip(self.schedules[0], times_s, strict=True)
            if each.is_forward == is_forward and each.vp_stage == 0
        ]
        return [time_s for _, time_s in sorted(found)]
