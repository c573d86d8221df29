"""The planner against runs that others published: tokens a second, memory, and what a change is worth.

    python -m tests.bench.planner_published [NAME ...]

Rows and their sources are in `tests/golden/published`. One constant per kind of device is fitted to its
calibration rows; test rows are planned with it. Prints a line for each row, then pairs and memory, and last
how many are in their bars; ends with 1 if one is missed. With names or parts of them it prints where the time
of these rows goes instead.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence

from k25_train.plan.memory.verdict import Fit, judge_memory
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.step_plan import StepPlan
from k25_train.units import GB
from tests.helpers.published import Pair, Published, Role, Row, read_published
from tests.helpers.published_fit import chip, fit_all, planned

SPEED_BAR = 0.15
"""By how much planned tokens a second may differ from measured ones."""
MEMORY_BAR = 0.10
"""The same of the allocator's peak."""


class Tally:
    """How many of what was compared are in their bars."""

    def __init__(self) -> None:
        self.num_good, self.missed = 0, list[str]()

    def add(self, name: str, *, is_good: bool) -> str:
        """Count one; how to say it."""
        if is_good:
            self.num_good += 1
            return "ok"
        self.missed.append(name)
        return "MISSED"

    def told(self, what: str) -> str:
        """The sum."""
        return f"{self.num_good} of {self.num_good + len(self.missed)} {what}"


def compare_speed(steps: Mapping[str, StepPlan], rows: Iterable[Row], tally: Tally) -> None:
    """A line for each row that was measured."""
    print(f"{'row':<52} {'measured':>9} {'planned':>9} {'error':>7}  tokens/s per GPU")
    for row in rows:
        measured, step = row.measured.tokens_per_s_per_gpu, steps[row.name]
        if measured is None or not row.measured.fits:
            continue
        error = step.tokens_per_s_per_gpu / measured - 1
        told = row.role.value
        if row.role is Role.test:
            told = tally.add(row.name, is_good=abs(error) <= SPEED_BAR)
        print(f"{row.name:<52} {measured:>9,.0f} {step.tokens_per_s_per_gpu:>9,.0f} {error:>+7.1%}  {told}")


def compare_pairs(steps: Mapping[str, StepPlan], pairs: Iterable[Pair], tally: Tally) -> None:
    """A line for each pair: what a change is worth, whose sign has to be right, or which has to be worth
    nothing."""
    print(f"\n{'change':<70} {'measured':>9} {'planned':>9}")
    for pair in pairs:
        before, after = (steps[row.name].tokens_per_s_per_gpu for row in (pair.without, pair.changed))
        percent = 100 * (after / before - 1)
        told = tally.add(pair.name, is_good=pair.is_right(percent))
        print(f"{pair.name:<70} {pair.percent:>+8.1f}% {percent:>+8.1f}%  {told}")


def compare_memory(steps: Mapping[str, StepPlan], rows: Iterable[Row], tally: Tally) -> None:
    """A line for each row whose memory was measured, or that did not fit."""
    print(f"\n{'memory, GB':<52} {'measured':>9} {'planned':>9} {'error':>7}")
    for row in rows:
        measured, below = row.measured.allocated_gb, row.measured.allocated_below_gb
        if measured is None and below is None and row.measured.fits:
            continue
        verdict = judge_memory(steps[row.name].pipeline, seeks_remedy=False)
        allocated = verdict.allocated_bytes / GB
        if measured is not None:
            error = allocated / measured - 1
            told = tally.add(f"{row.name}: memory", is_good=abs(error) <= MEMORY_BAR)
            print(f"{row.name:<52} {measured:>9.1f} {allocated:>9.1f} {error:>+7.1%}  {told}")
        elif below is not None:
            told = tally.add(f"{row.name}: memory", is_good=allocated <= below)
            print(f"{row.name:<52} {'<':>4}{below:>5.0f} {allocated:>9.1f} {'':>7}  {told}")
        if not row.measured.fits:
            told = tally.add(f"{row.name}: fits", is_good=verdict.fit is Fit.does_not_fit)
            print(f"{row.name:<52} {'does not fit':>19}, planned: {verdict.fit.value}  {told}")


def print_parts(step: StepPlan) -> None:
    """Where the time of a step goes."""
    print(f"    step {step.step_s:.2f} s, {step.tflops:.0f} TFLOP/s per GPU")
    for part in sorted(step.parts, key=lambda part: -part.seconds):
        print(
            f"    {part.seconds / step.step_s:>6.1%} {part.seconds:>8.3f} s  {part.cause.value} ({part.how})"
        )


def main(names: Sequence[str]) -> int:
    """Print the comparison; 1 if a bar is missed."""
    # 1. Constants, of calibration rows alone.
    published: Published = read_published()
    constants = fit_all(published.of(Role.calibration))
    for device, constant in constants.items():
        rows = [row.name for row in published.of(Role.calibration) if chip(row) == device]
        print(f"{device}: kernels take {constant:.3f} times what its data sheet says, by {', '.join(rows)}")
    # 2. Everything planned with them.
    steps = {row.name: plan_step(planned(row, constants[chip(row)])) for row in published.rows}
    if names:
        for name, step in steps.items():
            if any(each in name for each in names):
                print(name)
                print_parts(step)
        return 0
    speed, signs, memory = Tally(), Tally(), Tally()
    print()
    compare_speed(steps, published.rows, speed)
    compare_pairs(steps, published.pairs, signs)
    compare_memory(steps, published.rows, memory)
    # 3. The figure.
    for missed in (*speed.missed, *signs.missed, *memory.missed):
        print(f"missed: {missed}")
    told = speed.told(f"test rows within {SPEED_BAR:.0%}"), signs.told("signs right")
    print(f"\n{'; '.join(told)}; {memory.told(f'memory rows within {MEMORY_BAR:.0%}')}")
    return int(bool(speed.missed or signs.missed or memory.missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
