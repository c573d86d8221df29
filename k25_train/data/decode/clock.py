"""From time stamps as a file has them to the display times of its frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from k25_train.data.formats.frame_times import FrameTimes
from k25_train.errors import DataError

MIN_DELAY_S = Fraction(1, 100)
"""Delays of animated images up to this are shown as `DEFAULT_DELAY_S`, as all browsers do."""
DEFAULT_DELAY_S = Fraction(1, 10)
_MAX_ROUNDING_S = Fraction(1, 1000)


@dataclass(frozen=True, slots=True)
class Clock:
    """What a file says about its time stamps in general."""

    interval_s: Fraction
    """Time between frames by the stated frame rate."""
    tick_s: Fraction
    """Resolution of its time stamps."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Display time of a frame."""

    start_s: Fraction
    """When it appears, since the first frame."""
    duration_s: Fraction
    """How long it is shown if it is the last one; 0 if the file does not say."""
    clock: Clock


def frame_times(shown: Sequence[Shown]) -> FrameTimes:
    """Display times of all frames of a video.

    Stamps that are even but for rounding to the file's ticks (1/30 s in a container that counts milliseconds)
    are taken as even. Raises DataError if they go back.
    """
    starts, last = [frame.start_s for frame in shown], shown[-1]
    for previous, following in pairwise(starts):
        if following < previous:
            raise DataError(
                f"has time stamps that go back, from {float(previous):.3f} to {float(following):.3f} s"
            )
    rounding_s = min(last.clock.tick_s, _MAX_ROUNDING_S)
    intervals_s = [last.clock.interval_s]
    if len(starts) > 1 and starts[-1] > 0:
        intervals_s.append(starts[-1] / (len(starts) - 1))
    for interval_s in intervals_s:
        is_even = all(abs(start - number * interval_s) <= rounding_s for number, start in enumerate(starts))
        if is_even and (last.duration_s == 0 or abs(last.duration_s - interval_s) <= rounding_s):
            return FrameTimes.even(len(starts), interval_s)
    durations_s = [following - start for start, following in pairwise(starts)]
    return FrameTimes.from_durations([*durations_s, last.duration_s or last.clock.interval_s])
