"""When each pass of a pipeline runs, and when its ranks are idle. Pure; standard library only.

`simulate` plays the lists of passes that `schedule_of` gives against durations, with work of the vision tower
laid between the passes.

A pass starts when its rank is free and its input has arrived. Sending costs the sender nothing and waits for
nobody. Of passes that run beside each other, as with `overlap_expert_comm`, both inputs are needed to start,
both outputs are there at the end, and both take as long as one after the other.

Ranks are numbered as megatron-core does: rank = stage * num_replicas + replica.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.pipeline.schedule import Pass

Before = Mapping[tuple[int, int], Sequence["Work"]]
"""(rank, position in its list of passes) -> work that the rank does, in order, once it has run all passes
before that position. The length of the list stands for the time after its last pass."""


class Work(NamedTuple):
    """Forward of the tower over some items of one micro-batch, or recomputation and backward."""

    is_forward: bool
    replica: int
    """Whose micro-batch it is. Its first chunk waits for all forward work of the micro-batch, and backward
    work waits for its first chunk's backward; any rank may do the work."""
    micro_batch: int
    seconds: float


class Slot(NamedTuple):
    """A time in which a rank is idle."""

    position: int
    """The pass that it waits for; the number of its passes if it has run them all."""
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSeconds:
    """Duration of a pass through each chunk, in pipeline order (chunk = vp_stage * pp + stage)."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When everything ran, in seconds from the start."""

    schedules: tuple[tuple[Pass, ...], ...]
    """[stage] -> its passes."""
    num_replicas: int
    starts_s: tuple[list[float], ...]
    """[rank][position] -> start of the pass."""
    ends_s: tuple[list[float], ...]
    """[rank][position] -> end of the pass."""
    work_starts_s: dict[tuple[int, int], list[float]]
    """(rank, position) -> start of each work done before that pass."""
    rank_ends_s: list[float]
    """[rank] -> end of all that it does."""

    @property
    def makespan_s(self) -> float:
        """When the last rank is done."""
        return max(self.rank_ends_s)

    def slots(self, rank: int) -> list[Slot]:
        """Idle times of a rank without other work, in order, the one after its last pass included."""
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


class ScheduleError(ValueError):
    """Passes and work that wait for each other, or for what never comes."""


def simulate(
    schedules: Sequence[Sequence[Pass]],
    seconds: ChunkSeconds,
    *,
    transfer_s: float = 0.0,
    before: Before | None = None,
    exchange_s: float = 0.0,
    num_replicas: int = 1,
) -> Timeline:
    """Run `num_replicas` alike pipelines, which meet only in the work of the tower.

    Args:
        schedules: passes of each stage, as `schedule_of` gives them.
        seconds: durations of the passes.
        transfer_s: from the end of a pass until the next chunk, on another rank or not, has its output.
        before: what ranks do besides, see `Before`.
        exchange_s: from the end of forward work until its features are at the first chunk, and from the end
            of the first chunk's backward until its gradients are where backward work needs them.

    Raises `ScheduleError` for work at no position of a rank, or between passes that run beside each other,
    and, naming what they wait for, if ranks wait for each other.
    """
    _check_positions(schedules, before or {}, num_replicas)
    run = _Run(schedules, seconds, transfer_s, before or {}, exchange_s, num_replicas)
    waiting = list(range(len(schedules) * num_replicas))
    while waiting:
        stuck = [rank for rank in waiting if not run.advance(rank)]
        if stuck == waiting and not run.has_moved:
            raise ScheduleError("; ".join(run.next_of(rank) for rank in stuck[:8]))
        waiting, run.has_moved = stuck, False
    return Timeline(
        schedules=tuple(tuple(passes) for passes in schedules),
        num_replicas=num_replicas,
        starts_s=tuple(run.starts_s),
        ends_s=tuple(run.ends_s),
        work_starts_s=run.work_starts_s,
        rank_ends_s=run.free_s,
    )


def _check_positions(schedules: Sequence[Sequence[Pass]], before: Before, num_replicas: int) -> None:
    for rank, position in before:
        passes = schedules[rank // num_replicas] if 0 <= rank < len(schedules) * num_replicas else ()
        if not passes or not 0 <= position <= len(passes):
            raise ScheduleError(f"work for rank {rank} before its pass {position}: there is no such place")
        if position and passes[position - 1].runs_beside_next:
            raise ScheduleError(
                f"work for rank {rank} before its pass {position}, which runs beside the one before: move it"
            )


class _Run:
    """The state of a simulation: what has been run, and from when on its results can be used."""

    def __init__(
        self,
        schedules: Sequence[Sequence[Pass]],
        seconds: ChunkSeconds,
        transfer_s: float,
        before: Before,
        exchange_s: float,
        num_replicas: int,
    ) -> None:
        self.schedules = schedules
        self.pp = len(schedules)
        self.seconds = seconds
        self.transfer_s = transfer_s
        self.before = before
        self.exchange_s = exchange_s
        self.num_replicas = num_replicas
        num_ranks = self.pp * num_replicas
        self.starts_s: list[list[float]] = [[] for _ in range(num_ranks)]
        self.ends_s: list[list[float]] = [[] for _ in range(num_ranks)]
        self.work_starts_s: dict[tuple[int, int], list[float]] = {}
        self.free_s = [0.0] * num_ranks
        self.has_moved = False
        self.num_chunks = len(seconds.forward_s)
        # [replica][chunk] -> micro-batch -> time from which the pass after this one may start.
        self.forward_at: list[list[dict[int, float]]] = self._empty()
        self.backward_at: list[list[dict[int, float]]] = self._empty()
        # (replica, micro-batch) -> forward work that is still to be done, and when the last of it is there.
        self.num_missing: dict[tuple[int, int], int] = {}
        self.features_at: dict[tuple[int, int], float] = {}
        for works in before.values():
            for work in works:
                if work.is_forward:
                    key = work.replica, work.micro_batch
                    self.num_missing[key] = self.num_missing.get(key, 0) + 1

    def _empty(self) -> list[list[dict[int, float]]]:
        return [[{} for _ in range(self.num_chunks)] for _ in range(self.num_replicas)]

    def advance(self, rank: int) -> bool:
        """Run a rank as far as what it waits for is known; whether it is through."""
        stage, replica = divmod(rank, self.num_replicas)
        passes, starts_s, ends_s = self.schedules[stage], self.starts_s[rank], self.ends_s[rank]
        while True:
            position = len(starts_s)
            if (rank, position) in self.before and not self._do_work(rank, position):
                return False
            if position == len(passes):
                return True
            first = passes[position]
            ready_s = self._ready(stage, replica, first)
            if first.runs_beside_next and ready_s is not None:
                other_s = self._ready(stage, replica, passes[position + 1])
                ready_s = None if other_s is None else max(ready_s, other_s)
            if ready_s is None:
                return False
            start_s = max(self.free_s[rank], ready_s)
            together = passes[position : position + 1 + first.runs_beside_next]
            end_s = start_s + sum(self._duration(stage, each) for each in together)
            for each in together:
                starts_s.append(start_s)
                ends_s.append(end_s)
                at = self.forward_at if each.is_forward else self.backward_at
                at[replica][each.vp_stage * self.pp + stage][each.micro_batch] = end_s
            self.free_s[rank] = end_s
            self.has_moved = True

    def _ready(self, stage: int, replica: int, each: Pass) -> float | None:
        """When what the pass needs from others is there; None if that is not known yet."""
        chunk, number = each.vp_stage * self.pp + stage, each.micro_batch
        if each.is_forward:
            if chunk == 0:
                key = replica, number
                return None if self.num_missing.get(key) else self.features_at.get(key, 0.0)
            at_s = self.forward_at[replica][chunk - 1].get(number)
        elif chunk == self.num_chunks - 1:
            return self.forward_at[replica][chunk].get(number)
        else:
            at_s = self.backward_at[replica][chunk + 1].get(number)
        return None if at_s is None else at_s + self.transfer_s

    def _duration(self, stage: int, each: Pass) -> float:
        of_chunks = self.seconds.forward_s if each.is_forward else self.seconds.backward_s
        return of_chunks[each.vp_stage * self.pp + stage]

    def _do_work(self, rank: int, position: int) -> bool:
        """Do what is left of the work before a pass; whether nothing is."""
        works = self.before[rank, position]
        starts_s = self.work_starts_s.setdefault((rank, position), [])
        for work in works[len(starts_s) :]:
            key = work.replica, work.micro_batch
            start_s = self.free_s[rank]
            if not work.is_forward:
                gradient_s = self.backward_at[work.replica][0].get(work.micro_batch)
                if gradient_s is None:
                    return False
                start_s = max(start_s, gradient_s + self.exchange_s)
            starts_s.append(start_s)
            self.free_s[rank] = start_s + work.seconds
            self.has_moved = True
            if work.is_forward:
                self.num_missing[key] -= 1
                features_s = self.free_s[rank] + self.exchange_s
                self.features_at[key] = max(self.features_at.get(key, 0.0), features_s)
        return True

    def next_of(self, rank: int) -> str:
        """What a rank is about to do, in words."""
        position = len(self.starts_s[rank])
        passes = self.schedules[rank // self.num_replicas]
        works = self.before.get((rank, position), ())[len(self.work_starts_s.get((rank, position), ())) :]
        what = works[0] if works else passes[position]
        return f"rank {rank} waits at position {position} for the inputs of {what}"
