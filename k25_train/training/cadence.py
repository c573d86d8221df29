"""When a run saves: every so many steps, or whenever so much time has passed."""

import time
from collections.abc import Callable

from k25_train.config.checkpoint import CheckpointConfig
from k25_train.training.soundness import Verdict


class SaveCadence:
    """Says at which steps to save. Time is that of one rank's clock, which tells the others."""

    def __init__(
        self, config: CheckpointConfig, *, has_clock: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            config: has the interval.
            has_clock: whether this rank's clock counts.
            clock: returns seconds since any fixed origin.
        """
        self._steps, self._seconds = config.interval_steps or 0, config.interval_s or 0.0
        self._has_clock, self._clock = has_clock, clock
        self._since = clock()
        self._is_postponed = False
        """Whether the last step at which to save was skipped."""

    def restart(self) -> None:
        """Count time from now on: a save begins, or the run does."""
        self._since = self._clock()

    @property
    def time_is_up(self) -> bool:
        """Whether the interval has passed by the clock that counts; False on ranks with another."""
        return bool(self._seconds) and self._has_clock and self._clock() - self._since >= self._seconds

    def is_due(self, step: int, verdict: Verdict, *, time_is_up: bool) -> bool:
        """Whether to save now: at the interval, or after it if that step was skipped, since the same state
        would be saved as an unsound one.

        `time_is_up` is what the rank says whose clock counts.
        """
        due = self._is_postponed or time_is_up or bool(self._steps and step % self._steps == 0)
        self._is_postponed = due and verdict.was_skipped
        return due and not verdict.was_skipped
