"""The schedule of a whole step from a few of its micro-batches, against the simulation of all of them."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25_train.compose.resolve import compose
from k25_train.plan.time.schedule import step_schedule
from parallel.config import ParallelismConfig
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import schedule_of
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Drawn:
    """`Durations` of a pipeline, and its sizes."""

    pp: int
    vpp: int
    overlaps: bool
    number: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    saved: float
    """Share that a pair takes less than its two passes."""
    sent_s: float
    """Seconds of messages of passes alone; a pair hides half of them."""

    @property
    def num_chunks(self) -> int:
        return self.pp * self.vpp

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        return self.forward_s[chunk] if is_forward else self.backward_s[chunk]

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        return (self.forward_s[forward_chunk] + self.backward_s[backward_chunk]) * (1 - self.saved)

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        return self.sent_s if forward_chunk is None or backward_chunk is None else self.sent_s / 2

    @property
    def sizes(self) -> ParallelismConfig:
        sizes = compose(["experiment=smoke"]).parallelism
        sizes.pp, sizes.vpp, sizes.overlap_expert_comm = self.pp, self.vpp, self.overlaps
        return sizes

    def full(self) -> Timeline:
        group_size = 1 if self.vpp == 1 else micro_batch_group_size(self.number, self.pp)
        return simulate(
            [
                schedule_of(self.pp, self.vpp, self.number, group_size, stage, overlaps=self.overlaps)
                for stage in range(self.pp)
            ],
            self,
        )


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    pp = draw(st.integers(1, 6))
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    # Even durations tie and are irregular otherwise; transfers can be what limits a pipeline.
    second = st.sampled_from([1.0, 1.0, 1.25, 0.7])
    seconds = st.tuples(*[second] * (pp * vpp))
    return Drawn(
        pp=pp,
        vpp=vpp,
        overlaps=draw(st.booleans()),
        number=draw(st.integers(pp, 90)),
        forward_s=draw(seconds),
        backward_s=draw(seconds),
        saved=draw(st.sampled_from([0.0, 0.2])),
        sent_s=draw(st.sampled_from([0.0, 0.1, 0.9])),
    )


@given(drawn())
def test_a_few_micro_batches_tell_how_long_all_take(case: Drawn) -> None:
    found, full = step_schedule(case.sizes, case.number, case), case.full()
    assert found.makespan_s == pytest.approx(full.makespan_s, rel=1e-9)
    for stage, passes in enumerate(full.schedules):
        number = Counter[tuple[bool, int]]()
        for use, times in found.uses[stage].items():
            if use.forward_chunk is not None:
                number[True, use.forward_chunk] += times
            if use.backward_chunk is not None:
                number[False, use.backward_chunk] += times
        assert number == Counter((each.is_forward, each.vp_stage * case.pp + stage) for each in passes)
        idle_s = sum(slot.seconds for slot in full.slots(stage))
        assert full.makespan_s - idle_s == pytest.approx(found.busy_s(stage, case), rel=1e-9)
    # What is behind the last pass, and before the first, is that of the whole step.
    for short, long in zip(found.timeline.ends_s, full.ends_s, strict=True):
        assert found.timeline.makespan_s - short[-1] == pytest.approx(full.makespan_s - long[-1], abs=1e-9)


def test_most_of_a_long_step_is_not_simulated() -> None:
    case = Drawn(16, 2, True, 1024, (1.0,) * 32, (2.0,) * 32, 0.1, 0.05)
    found = step_schedule(case.sizes, case.number, case)
    assert found.num_simulated <= 256
    assert found.makespan_s == pytest.approx(case.full().makespan_s, rel=1e-9)
