"""How fast the run goes and when it will end."""

from __future__ import annotations

SMOOTHING = 0.95
"""Weight of the past in the smoothed step time: about the last 20 steps count."""


class Throughput:
    """Seconds per step and time left, smoothed over recent steps."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._num_steps = 0
        self._smoothed_step_s = 0.0

    def add(self, step_time_s: float) -> None:
        """Account for one finished step of this process."""
        self._num_steps += 1
        self._smoothed_step_s = SMOOTHING * self._smoothed_step_s + (1 - SMOOTHING) * step_time_s

    @property
    def step_time_s(self) -> float:
        """Smoothed seconds per step; 0 before the first."""
        if self._num_steps == 0:
            return 0.0
        # Exponential averages start at zero; this undoes the bias (as Adam does, arXiv 1412.6980, section 3).
        return self._smoothed_step_s / (1 - SMOOTHING**self._num_steps)

    def time_left_s(self, step: int) -> float:
        """Seconds until the last step, when `step` steps are done, at the smoothed pace."""
        return self.step_time_s * max(0, self.total_steps - step)
