"""What a tensor of a checkpoint is, by its name: weight or optimizer state, and of which part of the model.

Needs no torch.
"""

import re
from collections.abc import Iterable
from enum import Enum
from functools import cache

from k25_train.parameters.entry import numbers_in, pattern_of
from k25_train.parameters.table import TABLE

_STATE = re.compile(r"optimizer\.state\.([^.]+)\.(.+)")


class State(Enum):
    """What is kept of a parameter."""

    weight = "weights"
    """The parameter as the model computes with it, or a buffer."""
    master = "masters"
    """Its float32 copy, which the optimizer updates."""
    first_moment = "1st moments"
    """AdamW's running mean of gradients, or Muon's momentum."""
    second_moment = "2nd moments"
    """AdamW's running mean of squared gradients."""
    other = "other"


STATES = {"param": State.master, "exp_avg": State.first_moment, "exp_avg_sq": State.second_moment}
"""Name of the optimizer's state in a checkpoint -> what it is."""
LANGUAGE_MODEL, EXPERTS, TOWER, PROJECTOR = "language model", "routed experts", "vision tower", "projector"
PARTS = (LANGUAGE_MODEL, EXPERTS, TOWER, PROJECTOR)
"""Parts of the model, in the order in which they are told; the first is without the second."""


def state_of(name: str) -> State:
    """What the tensor of that name is."""
    match = _STATE.fullmatch(name)
    return State.weight if match is None else STATES.get(match[1], State.other)


def parameter_of(name: str) -> str:
    """The name of the parameter that a tensor is, or is the state of."""
    match = _STATE.fullmatch(name)
    return name if match is None else match[2]


def part_of(name: str) -> str:
    """Part of the model that a tensor belongs to."""
    parameter = parameter_of(name)
    if parameter.startswith("vision_tower."):
        return TOWER
    if parameter.startswith("mm_projector."):
        return PROJECTOR
    return EXPERTS if ".mlp.experts." in parameter else LANGUAGE_MODEL


def place_of(name: str) -> tuple[int, str]:
    """Where the parameter of a tensor comes in the forward pass; unknown ones come last."""
    parameter = parameter_of(name)
    return _places().get(pattern_of(parameter), len(TABLE.entries)), parameter


@cache
def _places() -> dict[str, int]:
    return {name: number for number, name in enumerate(TABLE.by_stacked_name)}


def by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in the numbers of layer, block and expert alone, under their common pattern."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pattern_of(name), []).append(name)
    return found


def common_name(names: list[str]) -> str:
    """A pattern with the numbers that its names have: `layers.{1-60}.mlp`."""
    pattern, numbers = pattern_of(names[0]), [numbers_in(name) for name in names]
    places = [ranges(sorted({int(each[place]) for each in numbers})) for place in range(len(numbers[0]))]
    filled = iter(f"{{{text}}}" if not text.isdecimal() else text for text in places)
    return re.sub(r"\*", lambda _: next(filled), pattern)


def ranges(numbers: list[int]) -> str:
    """Sorted numbers in few characters: 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
