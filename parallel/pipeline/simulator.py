"""Simulates a pipeline: when each pass runs, given how long it takes. Pure; standard library only.

`simulate` replays the lists of passes of `schedule_of` with given durations, and with work of the vision
tower between the passes; the result is a `Timeline`.

A pass starts when its rank is free and its input has arrived. Sending costs the sender nothing and waits for
nobody. Overlapped passes, as with `overlap_expert_comm`, need both inputs to start, have both outputs at the
end, and take as long as `Durations` say of the two together.
"""

from collections.abc import Sequence

from parallel.pipeline.schedule import Pass
from parallel.pipeline.timeline import Durations, Timeline, WorkBefore


class ScheduleError(ValueError):
    """Passes and work that wait for each other, or for what never arrives."""


def simulate(
    schedules: Sequence[Sequence[Pass]],
    seconds: Durations,
    *,
    transfer_s: float = 0.0,
    before: WorkBefore | None = None,
    exchange_s: float = 0.0,
    num_replicas: int = 1,
) -> Timeline:
    """Run `num_replicas` identical pipelines, which interact only through the work of the tower.

    Args:
        schedules: [stage] -> its passes, from `schedule_of`.
        seconds: durations of the passes and of what they send.
        transfer_s: time from the end of a pass until the next chunk, on another rank or not, has its output;
            in addition to what `seconds` say of its message.
        before: work between passes.
        exchange_s: time from the end of forward work until its features are at the first chunk, and from the
            end of the first chunk's backward until its gradients are where backward work needs them.
        num_replicas: number of pipelines.

    Raises `ScheduleError` for work at a position that a rank does not have, or between overlapped passes, and
    if ranks wait for each other; it names what they wait for.
    """
    _check_positions(schedules, before or {}, num_replicas)
    run = _Run(schedules, seconds, transfer_s, before or {}, exchange_s, num_replicas)
    waiting = list(range(len(schedules) * num_replicas))
    # Each rank in turn as far as it gets, until all are done or a whole round moves none.
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


def _check_positions(schedules: Sequence[Sequence[Pass]], before: WorkBefore, num_replicas: int) -> None:
    for rank, position in before:
        passes = schedules[rank // num_replicas] if 0 <= rank < len(schedules) * num_replicas else ()
        if not passes or not 0 <= position <= len(passes):
            raise ScheduleError(f"work for rank {rank} before its pass {position}: there is no such position")
        if position and passes[position - 1].overlaps_next:
            raise ScheduleError(
                f"work for rank {rank} before its pass {position}, which overlaps the one before: move it"
            )


class _Run:
    """State of a simulation: what has run, and from when its results can be used."""

    def __init__(
        self,
        schedules: Sequence[Sequence[Pass]],
        seconds: Durations,
        transfer_s: float,
        before: WorkBefore,
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
        self.last = seconds.num_chunks - 1
        # (forward chunk, backward chunk) -> seconds of what runs them, and of its message.
        self.known: dict[tuple[int | None, int | None], tuple[float, float]] = {}
        # [replica][chunk] -> micro-batch -> time from which the pass after this one may start.
        self.forward_at: list[list[dict[int, float]]] = self._empty()
        self.backward_at: list[list[dict[int, float]]] = self._empty()
        # (replica, micro-batch) -> number of forward works still to do, and when the last features are there.
        self.num_missing: dict[tuple[int, int], int] = {}
        self.features_at: dict[tuple[int, int], float] = {}
        for works in before.values():
            for work in works:
                if work.is_forward:
                    key = work.replica, work.micro_batch
                    self.num_missing[key] = self.num_missing.get(key, 0) + 1

    def _empty(self) -> list[list[dict[int, float]]]:
        return [[{} for _ in range(self.last + 1)] for _ in range(self.num_replicas)]

    def advance(self, rank: int) -> bool:
        """Run a rank as far as its inputs are known; returns whether it has done everything."""
        stage, replica = divmod(rank, self.num_replicas)
        passes, starts_s, ends_s = self.schedules[stage], self.starts_s[rank], self.ends_s[rank]
        while True:
            # 1. Work of the tower before the next pass.
            position = len(starts_s)
            if (rank, position) in self.before and not self._do_work(rank, position):
                return False
            if position == len(passes):
                return True

            # 2. The next pass, or two overlapped ones, once all inputs are known.
            first = passes[position]
            ready_s = self._ready(stage, replica, first)
            if first.overlaps_next and ready_s is not None:
                other_s = self._ready(stage, replica, passes[position + 1])
                ready_s = None if other_s is None else max(ready_s, other_s)
            if ready_s is None:
                return False

            # 3. Its times, from which the passes that wait for it start.
            start_s = max(self.free_s[rank], ready_s)
            together = passes[position : position + 1 + first.overlaps_next]
            seconds, message_s = self._times(stage, together)
            end_s = start_s + seconds
            for each in together:
                starts_s.append(start_s)
                ends_s.append(end_s)
                chunk = each.vp_stage * self.pp + stage
                at, last = (self.forward_at, self.last) if each.is_forward else (self.backward_at, 0)
                # What an end of the pipeline gives stays on its rank.
                at[replica][chunk][each.micro_batch] = end_s if chunk == last else end_s + message_s
            self.free_s[rank] = end_s
            self.has_moved = True

    def _ready(self, stage: int, replica: int, each: Pass) -> float | None:
        """When the input of a pass is there; None if that is not known yet."""
        chunk, number = each.vp_stage * self.pp + stage, each.micro_batch
        if each.is_forward:
            if chunk == 0:
                key = replica, number
                return None if self.num_missing.get(key) else self.features_at.get(key, 0.0)
            at_s = self.forward_at[replica][chunk - 1].get(number)
        elif chunk == self.last:
            return self.forward_at[replica][chunk].get(number)
        else:
            at_s = self.backward_at[replica][chunk + 1].get(number)
        return at_s

    def _times(self, stage: int, together: Sequence[Pass]) -> tuple[float, float]:
        """Seconds of a pass, or of an overlapped forward pass and the backward pass behind it; and of its
        message."""
        first = together[0]
        chunk = first.vp_stage * self.pp + stage
        forward, backward = (chunk, None) if first.is_forward else (None, chunk)
        if len(together) == 2:
            backward = together[1].vp_stage * self.pp + stage
        found = self.known.get((forward, backward))
        if found is None:
            if len(together) == 2:
                seconds = self.seconds.pair_s(chunk, together[1].vp_stage * self.pp + stage)
            else:
                seconds = self.seconds.alone_s(chunk, is_forward=first.is_forward)
            found = seconds, self.transfer_s + self.seconds.message_s(forward, backward)
            self.known[forward, backward] = found
        return found

    def _do_work(self, rank: int, position: int) -> bool:
        """Do the rest of the work before a pass, as far as inputs are known; returns whether it is done."""
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
        """Description of what a rank waits for."""
        position = len(self.starts_s[rank])
        passes = self.schedules[rank // self.num_replicas]
        works = self.before.get((rank, position), ())[len(self.work_starts_s.get((rank, position), ())) :]
        what = works[0] if works else passes[position]
        return f"rank {rank} waits at position {position} for the inputs of {what}"
