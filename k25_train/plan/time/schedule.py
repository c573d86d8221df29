"""The schedule of a step, simulated for a few micro-batches and extrapolated to all of them; torch-free.

After a warm-up every group of micro-batches runs like the one before it, a constant time later, until the
cool-down. So a step with more groups takes longer by a multiple of that time, exactly:

- A few groups in a row, `linked`, separate what comes before them from what comes after: no pass waits for
  one that is more groups away.
- If all passes of these groups end a constant time after those of as many groups that lie one period earlier,
  then whatever comes behind them does, too: it waits for the same passes, in the same order.

That is looked up in the simulated timeline itself. Where it does not hold yet, as with a stage that falls
behind slowly, more groups are simulated, and in the end all of them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.config import ParallelismConfig
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import Durations, Timeline

SAME = 1e-12
"""Share of the simulated time by which times that are equal may differ: rounding of sums."""


class PassUse(NamedTuple):
    """What a stage runs at a time, by chunks in pipeline order: one pass, or an overlapped pair."""

    forward_chunk: int | None
    """Chunk of the forward pass; None for a backward pass alone."""
    backward_chunk: int | None
    """Chunk of the backward pass; None for a forward pass alone."""


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """When the passes of a step run."""

    timeline: Timeline
    """Of the simulated micro-batches: the first ones of the step, and the last ones as if they came next."""
    num_simulated: int
    """Micro-batches of the timeline."""
    makespan_s: float
    """Seconds of all passes of the step."""
    uses: tuple[Mapping[PassUse, int], ...]
    """[stage] -> how often it runs what in the step."""

    def busy_s(self, stage: int, seconds: Durations) -> float:
        """Seconds in which a stage runs passes."""
        return sum(number * use_s(use, seconds) for use, number in self.uses[stage].items())


def use_s(use: PassUse, seconds: Durations) -> float:
    """How long a pass or pair takes."""
    forward, backward = use
    if forward is not None and backward is not None:
        return seconds.pair_s(forward, backward)
    if forward is not None:
        return seconds.alone_s(forward, is_forward=True)
    assert backward is not None, "a pass has a chunk"
    return seconds.alone_s(backward, is_forward=False)


def step_schedule(sizes: ParallelismConfig, num_micro_batches: int, seconds: Durations) -> StepSchedule:
    """The schedule of a step.

    Args:
        sizes: of the pipeline.
        num_micro_batches: of the step, on each replica.
        seconds: durations of passes.
    """
    group_size = 1 if sizes.vpp == 1 else micro_batch_group_size(num_micro_batches, sizes.pp)
    linked, num_groups = _num_linked(sizes, group_size), num_micro_batches // group_size
    # `linked` groups in which the pipeline fills, as many that are compared with those one group later, and
    # as many behind them, with which backward passes of these alternate.
    kept = 3 * linked + 1
    while kept < num_groups:
        # 1. A shorter step; its groups have the same size.
        skipped = num_groups - kept
        number = num_micro_batches - skipped * group_size
        schedules = _schedules(sizes, number, group_size)
        timeline = simulate(schedules, seconds)
        # 2. What it repeats. Periods may not divide what is skipped.
        period = _period(timeline, group_size, linked, kept)
        if period is None:
            kept *= 2
        elif skipped % period.groups:
            kept += skipped % period.groups
        else:
            # 3. As often as groups were left out.
            size, times = period.groups * group_size * sizes.vpp, skipped // period.groups
            return StepSchedule(
                timeline=timeline,
                num_simulated=number,
                makespan_s=timeline.makespan_s + times * period.seconds,
                uses=tuple(
                    _uses(passes, stage, sizes.pp, size, times) for stage, passes in enumerate(schedules)
                ),
            )
    schedules = _schedules(sizes, num_micro_batches, group_size)
    timeline = simulate(schedules, seconds)
    return StepSchedule(
        timeline=timeline,
        num_simulated=num_micro_batches,
        makespan_s=timeline.makespan_s,
        uses=tuple(Counter(_used(passes, stage, sizes.pp)) for stage, passes in enumerate(schedules)),
    )


class _Period(NamedTuple):
    """What a step repeats."""

    groups: int
    """Groups of micro-batches."""
    seconds: float
    """How long they take."""


def _num_linked(sizes: ParallelismConfig, group_size: int) -> int:
    """By how many groups passes can differ of which one waits for the other: those that follow each other on
    the rank that runs the most forward passes ahead."""
    ahead = sizes.pp if sizes.vpp == 1 else 2 * sizes.pp - 1 + (sizes.vpp - 1) * group_size
    return -(-(ahead + 1) // (sizes.vpp * group_size))


def _schedules(sizes: ParallelismConfig, number: int, group_size: int) -> list[list[Pass]]:
    overlaps, group_size = sizes.overlap_expert_comm, number if sizes.vpp == 1 else group_size
    return [
        schedule_of(sizes.pp, sizes.vpp, number, group_size, stage, overlaps=overlaps)
        for stage in range(sizes.pp)
    ]


def _period(timeline: Timeline, group_size: int, linked: int, kept: int) -> _Period | None:
    """The shortest period of the groups before the cool-down; None if they do not repeat."""
    ends_s = [
        {each[:3]: end_s for each, end_s in zip(passes, of_stage, strict=True)}
        for passes, of_stage in zip(timeline.schedules, timeline.ends_s, strict=True)
    ]
    # The last `linked` groups run in the cool-down, in which there are no forward passes.
    for groups in range(1, kept - 2 * linked + 1):
        after = (kept - linked) * group_size
        compared = range(after - linked * group_size, after)
        seconds = _common_difference(ends_s, compared, groups * group_size, SAME * timeline.makespan_s)
        if seconds is not None:
            return _Period(groups, seconds)
    return None


def _common_difference(
    ends_s: Sequence[Mapping[tuple[bool, int, int], float]], compared: range, shift: int, tolerance_s: float
) -> float | None:
    """By how much all passes of some micro-batches end later than those that lie `shift` earlier."""
    least_s, most_s = float("inf"), float("-inf")
    for of_stage in ends_s:
        for (is_forward, vp_stage, number), end_s in of_stage.items():
            if number in compared:
                later_s = end_s - of_stage[is_forward, vp_stage, number - shift]
                least_s, most_s = min(least_s, later_s), max(most_s, later_s)
        if most_s - least_s > tolerance_s:
            return None
    return (least_s + most_s) / 2


def _uses(passes: Sequence[Pass], stage: int, pp: int, size: int, times: int) -> Mapping[PassUse, int]:
    """What a stage runs in a step that has `times` more periods of `size` passes in each direction."""
    found = Counter(_used(passes, stage, pp))
    # Behind the warm-up each forward pass is followed by a backward pass.
    start = next(position for position, each in enumerate(passes) if not each.is_forward) - 1
    for use, number in Counter(_used(passes[start : start + 2 * size], stage, pp)).items():
        found[use] += times * number
    return found


def _used(passes: Sequence[Pass], stage: int, pp: int) -> Iterator[PassUse]:
    """What is run, in order."""
    is_second = False
    for each, after in zip(passes, [*passes[1:], None], strict=True):
        chunk = each.vp_stage * pp + stage
        if each.overlaps_next:
            assert after is not None, "a pass overlaps with one behind it"
            yield PassUse(chunk, after.vp_stage * pp + stage)
        elif not is_second:
            yield PassUse(chunk, None) if each.is_forward else PassUse(None, chunk)
        is_second = each.overlaps_next
