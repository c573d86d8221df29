"""Chance, keyed by what is made: words, places, colours and file names for a task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "orange": (245, 140, 20),
    "purple": (140, 50, 170),
    "cyan": (60, 200, 220),
    "pink": (250, 150, 190),
    "brown": (120, 75, 40),
}
"""Name -> RGB. No two of them are easily confused, by name or by value."""
GROUNDS: tuple[Colour, ...] = ((255, 255, 255), (245, 240, 225), (225, 232, 240), (30, 32, 38))
"""Of pages, screens and boards."""
_STEMS = ("scene", "board", "photo", "screen", "picture", "map", "sheet", "shot", "view", "figure")
_FORMATS = ("png", "png", "png", "bmp", "tiff")
_SIDES = {1: (96, 160), 2: (160, 320), 3: (280, 480)}
"""Difficulty -> range of an image's sides in pixels."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of whole pixels; the ends are outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def inclusive(self) -> tuple[int, int, int, int]:
        """As Pillow draws it: the ends are inside."""
        return self.left, self.top, self.right - 1, self.bottom - 1


class Draw:
    """A source of chance that depends on its key alone."""

    def __init__(self, *key: int) -> None:
        """`key`: whole numbers from 0 on, such as the seed and the number of the trace."""
        self._random = np.random.default_rng(list(key))

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self._random.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self._random.random() < probability)

    def of[T](self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[int(self._random.integers(len(choices)))]

    def some[T](self, choices: Sequence[T], count: int) -> list[T]:
        """So many different ones, in random order."""
        return [choices[int(at)] for at in self._random.permutation(len(choices))[:count]]

    def colours(self, count: int) -> list[str]:
        """Names of so many colours, all different."""
        return self.some(list(COLOURS), count)

    def ground(self) -> Colour:
        """A background that is none of `COLOURS`."""
        return self.of(GROUNDS)

    def file(self) -> str:
        """Name of an image file, in a lossless format."""
        number = f"_{self.between(1, 99):02d}" if self.chance(0.6) else ""
        return f"{self.of(_STEMS)}{number}.{self.of(_FORMATS)}"

    def size(self, difficulty: int) -> tuple[int, int]:
        """Width and height of an image."""
        low, high = _SIDES[difficulty]
        return self.between(low, high), self.between(low * 3 // 4, high * 3 // 4)

    def boxes(self, size: tuple[int, int], sides: Sequence[tuple[int, int]], gap: int = 3) -> list[Box]:
        """Places of rectangles with these widths and heights, at least `gap` pixels apart and inside of the
        image. Those for which no place is found in 200 tries are left out, the last ones first."""
        found: list[Box] = []
        for width, height in sides:
            for _ in range(200):
                if width + 2 * gap >= size[0] or height + 2 * gap >= size[1]:
                    break
                left = self.between(gap, size[0] - gap - width)
                top = self.between(gap, size[1] - gap - height)
                box = Box(left, top, left + width, top + height)
                if all(_apart(box, other, gap) for other in found):
                    found.append(box)
                    break
        return found


def _apart(one: Box, other: Box, gap: int) -> bool:
    return (
        one.right + gap <= other.left
        or other.right + gap <= one.left
        or one.bottom + gap <= other.top
        or other.bottom + gap <= one.top
    )
