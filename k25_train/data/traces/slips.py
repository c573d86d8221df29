"""Mistakes of the assistant and how it corrects them: the traceback between them is a real one."""

from collections.abc import Callable

from k25_train.data.traces.draw import Draw
from k25_train.data.traces.task import Cell, Task

Slip = Callable[[Draw, Task], tuple[Cell, ...]]
"""From a task to its cells with a mistake and its correction; its own cells where there is none to make."""


def wrong_name(draw: Draw, task: Task) -> tuple[Cell, ...]:
    """The file is opened under another name, then looked up."""
    first, *others = task.cells
    file = next(iter(task.images))
    stem, extension = file.rsplit(".", 1)
    wrong = draw.of((f"{stem}.jpg", f"{stem.capitalize()}.{extension}", f"images/{file}"))
    return (
        Cell(first.thought, first.code.replace(repr(file), repr(wrong))),
        Cell("There is no file of that name. Which ones are there?", "import os\n\nsorted(os.listdir('.'))"),
        Cell(f"It is {file}. Once more with that name.", first.code),
        *others,
    )


def no_import(draw: Draw, task: Task) -> tuple[Cell, ...]:
    """NumPy is used before it is imported."""
    first, *others = task.cells
    line = "import numpy as np\n"
    return (
        Cell(first.thought, first.code.replace(line, "", 1)),
        Cell(draw.of(("I have not imported NumPy. Again:", "The import of NumPy is missing.")), first.code),
        *others,
    )


def wrong_attribute(draw: Draw, task: Task) -> tuple[Cell, ...]:
    """The size is asked for under a name that images do not have."""
    first, *others = task.cells
    if "print(img.size)" not in first.code:
        return task.cells
    wrong = draw.of(("img.shape", "img.dimensions", "img.resolution"))
    return (
        Cell(first.thought, first.code.replace("print(img.size)", f"print({wrong})")),
        Cell(f"Images of Pillow have no `{wrong[4:]}`; it is `size`.", first.code),
        *others,
    )


SLIPS: tuple[Slip, ...] = (wrong_name, no_import, wrong_attribute)
