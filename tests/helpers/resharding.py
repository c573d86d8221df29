"""Layouts that a run changes between, in pairs that have every change of every setting.

A change of one setting never comes alone: pairs are chosen so that together they have, of each setting, every
step from one of its values to another.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tests.helpers.optimizer_on_host import ON_DEVICE, ON_HOST
from tests.helpers.runs import layout


class Layout(NamedTuple):
    """Where a run is, as far as a checkpoint might notice."""

    pp: int
    vpp: int
    ep: int
    dp: int
    cp: int
    dep: str
    offload: bool

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.cp

    @property
    def overrides(self) -> list[str]:
        place = ON_HOST if self.offload else ON_DEVICE
        return [*layout(self.pp, self.vpp, self.ep, self.dp, self.cp), f"dep.mode={self.dep}", place]


ALONE = Layout(1, 1, 1, 1, 1, "decoupled", False)
SMOKE = Layout(2, 2, 2, 2, 1, "decoupled", False)
EXPERTS = Layout(1, 1, 4, 4, 1, "decoupled", True)
COUPLED = Layout(1, 1, 2, 4, 1, "coupled", True)
STAGES = Layout(4, 1, 1, 1, 1, "coupled", False)
VIRTUAL = Layout(2, 2, 1, 2, 1, "coupled", True)
TWO = Layout(2, 1, 2, 2, 1, "decoupled", True)
SHARED = Layout(1, 1, 2, 2, 2, "coupled", True)
SHARED_BY_FOUR = Layout(1, 1, 4, 1, 4, "coupled", False)
SHARED_STAGES = Layout(2, 2, 1, 1, 2, "coupled", False)

PAIRS = (
    (SMOKE, SHARED), (SMOKE, COUPLED), (COUPLED, STAGES), (STAGES, EXPERTS), (EXPERTS, ALONE),
    (ALONE, VIRTUAL), (VIRTUAL, TWO), (TWO, STAGES), (STAGES, SMOKE), (SMOKE, ALONE), (ALONE, EXPERTS),
    (EXPERTS, COUPLED), (COUPLED, EXPERTS), (EXPERTS, VIRTUAL),
    (SHARED, SHARED_BY_FOUR), (SHARED_BY_FOUR, SHARED_STAGES),
    (SHARED_STAGES, ALONE), (ALONE, SHARED_BY_FOUR), (SHARED_BY_FOUR, STAGES), (STAGES, SHARED_STAGES),
)  # fmt: skip
"""Saved in, loaded into."""


def changes(pairs: tuple[tuple[Layout, Layout], ...]) -> set[tuple[str, object, object]]:
    """(setting, value before, value after) of each setting that changes in each pair."""
    return {
        (name, before, after)
        for saved, loaded in pairs
        for name, before, after in zip(Layout._fields, saved, loaded, strict=True)
        if before != after
    }


def all_changes() -> Iterator[tuple[str, object, object]]:
    """Every change between values that the layouts have."""
    used = [each for pair in PAIRS for each in pair]
    for index, name in enumerate(Layout._fields):
        values = {each[index] for each in used}
        yield from ((name, one, other) for one in values for other in values if one != other)
