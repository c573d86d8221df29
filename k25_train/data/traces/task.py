"""A question about images, the code that answers it, and what the answer has to be.

The parts of a conversation that need no execution: a family draws images whose contents it knows, asks about
them, and writes the cells that somebody would run who cannot see. What the cells print is not its business.
"""

import ast
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Template

from PIL import Image

from k25_train.data.traces.draw import Draw

Value = int | float | str | tuple[int, ...]
"""What the last cell says: a Python literal in its last line."""


class NoValueError(ValueError):
    """The last line of an output is no value."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One call of the tool."""

    thought: str
    """What the assistant thinks before it."""
    code: str
    """What it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question with its images."""

    images: Mapping[str, Image.Image]
    """File name -> image; the extension says in which lossless format it is stored."""
    question: str
    """What the user asks."""
    cells: tuple[Cell, ...]
    """In order, in one session; the first one opens the images."""
    truth: Value
    """The answer, known from how the images were drawn, not from their pixels."""
    answer: Callable[[Value], str]
    """From what the last cell says to the words of the assistant."""
    conclusion: str = ""
    """What the assistant thinks before it answers."""


Family = Callable[[Draw, int], Task]
"""From a source of chance and a difficulty (1 easy, 2, 3) to a task."""


def cell(thought: str, code: str, **values: object) -> Cell:
    """A cell from an indented text with `$name` in the place of values, written as Python literals."""
    filled = Template(textwrap.dedent(code).strip()).substitute({k: repr(v) for k, v in values.items()})
    return Cell(thought, filled)


def value_of(output: str) -> Value:
    """The value in the last line of an output. Raises NoValueError for anything but a literal."""
    lines = output.strip().splitlines()
    try:
        found = ast.literal_eval(lines[-1])
    except (IndexError, ValueError, SyntaxError) as error:
        raise NoValueError(f"no value: {output[-200:]!r}") from error
    if isinstance(found, bool) or not isinstance(found, int | float | str | tuple):
        raise NoValueError(f"no value: {found!r}")
    return found
