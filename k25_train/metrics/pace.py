"""How long steps take next to what was planned.

A plan has the rates of its device's file, or what `k25-plan calibrate` fitted. Those of CPUs that were not
calibrated mean nothing but proportions: their runs are held against no plan.
"""

from collections import deque
from collections.abc import Callable
from functools import cache
from statistics import median

from k25_train.config.schema import Config
from k25_train.metrics.sinks import Row
from k25_train.plan.time.plan_step import expected_step_s

TOLERANCE = 0.15
"""Share of the planned time by which steps may differ from it without a word."""
WARM_UP_STEPS = 3
"""Steps that warm up caches, allocators and connections; they are not looked at."""
COMPARED_STEPS = 9
"""Latest steps whose median is compared: a checkpoint or a slow read moves no median."""
PLANNED = "planned_step_time_s"


class Pace:
    """Compares the steps of this process with their plan."""

    def __init__(self, planned_s: Callable[[int], float | None]) -> None:
        """`planned_s` gives the seconds of a step; None if there is no plan to compare with."""
        self._planned_of = planned_s
        self._planned_s: float | None = None
        self._num_steps = 0
        self._latest: deque[float] = deque(maxlen=COMPARED_STEPS)
        self._has_told = False

    def figures(self, step: int) -> Row:
        """What the row of a step has in addition, which `add` then accounts for."""
        planned_s = self._planned_of(step)
        if planned_s != self._planned_s:
            self._latest.clear()
        self._planned_s = planned_s
        return {} if planned_s is None else {PLANNED: planned_s}

    def add(self, step_time_s: float) -> str:
        """Account for a finished step; what to say of it, once in a process, mostly nothing."""
        self._num_steps += 1
        if self._planned_s is None or self._num_steps <= WARM_UP_STEPS:
            return ""
        self._latest.append(step_time_s)
        measured_s = median(self._latest)
        off = measured_s / self._planned_s - 1
        if self._has_told or len(self._latest) < COMPARED_STEPS or abs(off) <= TOLERANCE:
            return ""
        self._has_told = True
        return (
            f"steps take {measured_s:.3g} s (median of {COMPARED_STEPS}), {abs(off):.0%} "
            f"{'longer' if off > 0 else 'shorter'} than the {self._planned_s:.3g} s planned; where the time "
            "should go is in `python -m k25_train.plan … --details`, where it goes in the timeline of a run "
            "with train.trace_step=N; `python -m k25_train.plan calibrate` fits the plan's constants to a run"
        )


def pace_of(config: Config) -> Pace:
    """The pace of a run of this configuration."""

    @cache
    def of_size(size: int) -> float | None:
        return expected_step_s(config.of_batch(size))

    return Pace(lambda step: of_size(config.train.batches.size_of(step)))
