"""When each frame of a video is shown, as one short text in the index.

    "1/30 1x300"              300 frames of 1/30 s: constant rate
    "1/1000 33x29 5043 1000"  29 frames of 33 ms, one of 5.043 s, one of 1 s

The first word is the unit in seconds; each further one is a run of frames shown for equally many units. A
constant rate takes about 12 bytes however long the video is; without any regularity it is 3 to 5 bytes per
frame.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Self

_TEXT = re.compile(r"\d{1,40}/[1-9]\d{0,39}( \d{1,40}(x[1-9]\d{0,39})?)+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Sample:
    """A look at a video."""

    frame: int
    """Position of the frame that is on screen then."""
    frame_start: int
    """When that frame appears, in units since the first one."""
    time: float
    """When the look is taken, in the same units."""


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """Display times of all frames of a video; the first frame appears at 0."""

    unit_s: Fraction
    """Length of a unit in seconds."""
    runs: tuple[tuple[int, int], ...]
    """(units that a frame is shown, how many frames in a row), in the order of the frames."""

    def __post_init__(self) -> None:
        """Raises ValueError for times that no video has."""
        if self.unit_s <= 0 or any(units < 0 or count < 1 for units, count in self.runs):
            raise ValueError(f"impossible frame times: {self}")
        if self.num_units < 1:
            raise ValueError("no frame is shown for any time")

    @classmethod
    def even(cls, num_frames: int, interval_s: Fraction) -> Self:
        """Frames that follow one another every `interval_s`."""
        return cls(interval_s, ((1, num_frames),))

    @classmethod
    def from_durations(cls, durations_s: Iterable[Fraction]) -> Self:
        """Frames shown for `durations_s`, in the largest unit that counts all of them."""
        durations = list(durations_s)
        denominator = math.lcm(*(duration.denominator for duration in durations))
        numerators = [duration.numerator * (denominator // duration.denominator) for duration in durations]
        common = math.gcd(*numerators) or 1
        runs = ((units // common, len(list(run))) for units, run in groupby(numerators))
        return cls(Fraction(common, denominator), tuple(runs))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`. Raises ValueError for any other text."""
        if not _TEXT.fullmatch(text):
            raise ValueError(f"no frame times: {text[:80]!r}")
        unit, *words = text.split(" ")
        numerator, denominator = unit.split("/")
        runs = []
        for word in words:
            units, _, count = word.partition("x")
            runs.append((int(units), int(count or 1)))
        return cls(Fraction(int(numerator), int(denominator)), tuple(runs))

    def __str__(self) -> str:
        words = [f"{units}x{count}" if count > 1 else str(units) for units, count in self.runs]
        return " ".join([f"{self.unit_s.numerator}/{self.unit_s.denominator}", *words])

    @property
    def num_frames(self) -> int:
        """Frames in the video."""
        return sum(count for _, count in self.runs)

    @property
    def num_units(self) -> int:
        """Length of the video in units, with the time that the last frame is shown."""
        return sum(units * count for units, count in self.runs)

    @property
    def duration_s(self) -> float:
        """Length of the video in seconds."""
        return float(self.num_units * self.unit_s)

    def sampled(self, num_samples: int) -> Iterator[Sample]:
        """`num_samples` looks, evenly spread from the first frame on.

        A look at time t sees the last frame that has appeared by t. Exact, in whole numbers.
        """
        runs = iter(self.runs)
        num_units = self.num_units
        units, count = next(runs)
        first_frame = start = 0
        for number in range(num_samples):
            # Times are in units / num_samples here, so that they are whole.
            time = number * num_units
            while time >= (start + units * count) * num_samples:
                first_frame, start = first_frame + count, start + units * count
                units, count = next(runs)
            passed = (time - start * num_samples) // (units * num_samples)
            yield Sample(first_frame + passed, start + passed * units, time / num_samples)
