"""Pictures of coloured shapes, of which those of one colour are to be counted.

The demonstrations look at the shapes one after another, row by row, before they answer. Pictures are drawn
with Pillow, as PNG files: the same task gives the same pixels.
"""

import io
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from k25_train.environments.base import Task
from k25_train.environments.family import Family, Options, Script, read_range, say, user
from k25_train.errors import ConfigError

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (50, 80, 220)}
SHAPES = ("disc", "square")
CELL = 28
"""Pixels of a place for one shape: the pixels of one vision token."""
MARGIN = 4


class Shape(NamedTuple):
    """One shape of a picture."""

    place: int
    """Cell, row by row."""
    kind: str
    """One of `SHAPES`."""
    colour: str
    """One of `COLOURS`."""


class Picture(NamedTuple):
    """What is seen, and asked."""

    side: int
    """Cells in a row and in a column."""
    shapes: tuple[Shape, ...]
    """In order of their places."""
    colour: str
    """What is counted."""


class Counting(Family[Picture]):
    """How many shapes of one colour are in a picture. Tasks with equally many shapes are one problem."""

    name = "counting"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `shapes` (how many in a picture, a range), `side` (cells in a row). Raises ConfigError."""
        given = Options(self.name, options)
        self._shapes = given.take("shapes", "1-5", read_range, "must be a number, or a range such as 1-5")
        sides = given.take("side", "3", read_range, "must be a number of 1 or more")
        given.end()
        self._side = sides[-1]
        if self._shapes[-1] > self._side**2:
            raise ConfigError(
                f"options.shapes of the family {self.name}: up to {self._shapes[-1]} shapes do not fit the "
                f"{self._side**2} places of side={self._side}\n  -> use fewer, or a wider side"
            )

    def draw(self, rng: random.Random) -> Picture:
        """See `Family`."""
        places = sorted(rng.sample(range(self._side**2), rng.choice(self._shapes)))
        colours = list(COLOURS)
        shapes = tuple(Shape(place, rng.choice(SHAPES), rng.choice(colours)) for place in places)
        return Picture(self._side, shapes, rng.choice(colours))

    def make(self, key: str, content: Picture) -> Task:
        """See `Family`."""
        parts: list[dict[str, Any]] = [
            {"type": "image", "image": "0"},
            {"type": "text", "text": f"How many are {content.colour}?"},
        ]
        return Task(
            key=key,
            family=self.name,
            messages=user(parts),
            media=(png_of(content),),
            reference=str(count_of(content)),
            judge="answer",
            problem=f"{self.name}/{len(content.shapes)}",
            thinking=True,
        )

    def solve(self, content: Picture) -> Script:
        """See `Family`: what is seen, row by row."""
        seen = ",".join(f"{shape.colour} {shape.kind}" for shape in content.shapes)
        return (say(str(count_of(content)), seen),)

    def cheats(self, content: Picture) -> Mapping[str, Script]:
        """See `Family`."""
        numbers = " ".join(map(str, range(len(content.shapes) + 2)))
        return {
            "guess": (say(str(count_of(content) + 1), "?"),),
            "every number": (say(numbers, "?"),),
        }


def count_of(picture: Picture) -> int:
    """The answer."""
    return sum(shape.colour == picture.colour for shape in picture.shapes)


def png_of(picture: Picture) -> bytes:
    """The picture as a PNG file, on white."""
    image = Image.new("RGB", (picture.side * CELL, picture.side * CELL), (255, 255, 255))
    canvas = ImageDraw.Draw(image)
    for shape in picture.shapes:
        row, column = divmod(shape.place, picture.side)
        left, top = column * CELL + MARGIN, row * CELL + MARGIN
        box = (left, top, left + CELL - 2 * MARGIN, top + CELL - 2 * MARGIN)
        outline = canvas.ellipse if shape.kind == "disc" else canvas.rectangle
        outline(box, fill=COLOURS[shape.colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
