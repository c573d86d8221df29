"""How fast the run goes and when it will end."""

from __future__ import annotations

from k25_train.config.batches import BatchSchedule

SMOOTHING = 0.95
"""Weight of the past in the smoothed pace: about the last 20 steps count."""


class Throughput:
    """Seconds per sequence, smoothed over recent steps, and time left: batches may grow during a run."""

    def __init__(self, total_steps: int, batches: BatchSchedule) -> None:
        self._batches = batches
        self._total_steps = total_steps
        self._num_steps = 0
        self._smoothed_s = 0.0

    def add(self, step: int, step_time_s: float) -> None:
        """Account for a step that this process has finished."""
        of_sequence_s = step_time_s / self._batches.size_of(step)
        self._num_steps += 1
        self._smoothed_s = SMOOTHING * self._smoothed_s + (1 - SMOOTHING) * of_sequence_s

    @property
    def sequence_s(self) -> float:
        """Smoothed seconds per sequence of the global batch; 0 before the first step."""
        if self._num_steps == 0:
            return 0.0
        # Exponential averages start at zero; this undoes the bias (as Adam does, arXiv 1412.6980, section 3).
        return self._smoothed_s / (1 - SMOOTHING**self._num_steps)

    def time_left_s(self, step: int) -> float:
        """Seconds until the last step, when `step` steps are done, at the smoothed pace."""
        sequences = self._batches.sequences_after(self._total_steps) - self._batches.sequences_after(step)
        return self.sequence_s * max(0, sequences)
