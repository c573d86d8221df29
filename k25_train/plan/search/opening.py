"""What workers do: open groups into layouts, layouts into candidates, and plan those; torch-free."""

from dataclasses import dataclass
from typing import Protocol

from k25_train.plan.search.best_first import Item
from k25_train.plan.search.candidates import activation_names, simplicity
from k25_train.plan.search.space import Candidate, Choice, Group, Layout, choices, layouts_of
from k25_train.plan.search.trial import Planner, Trial


class Floors(Protocol):
    """The least seconds of a step."""

    def of_layout(self, planner: Planner, layout: Layout, context_parallel: int) -> float:
        """Of every candidate with a layout."""

    def of_candidate(self, planner: Planner, candidate: Candidate) -> float:
        """Of one candidate; `of_layout` counts, too."""


@dataclass(frozen=True, slots=True)
class Open:
    """A group or a layout to open."""

    what: Group | Layout
    """What it is."""
    bound: float
    """What the items in it have at least."""


@dataclass(frozen=True, slots=True)
class Work:
    """Does what an item is for. Can be sent to another process."""

    planner: Planner
    """Plans candidates."""
    floors: Floors
    """Bounds of candidates."""
    context_parallel: int
    """Ranks that share a sequence."""

    def __call__(self, what: Open | Candidate) -> list[Item] | Trial:
        """The items in a group or layout, or the plan of a candidate."""
        if isinstance(what, Candidate):
            return self.planner.plan(what)
        if isinstance(what.what, Group):
            return self._layouts(what.what)
        return self._candidates(what.what, what.bound)

    def num_candidates(self, group: Group) -> int:
        """Candidates of a group."""
        layouts = layouts_of(self.planner.config, group, self.context_parallel)
        return sum(1 for _ in layouts) * len(self._choices())

    def _layouts(self, group: Group) -> list[Item]:
        found = []
        for layout in layouts_of(self.planner.config, group, self.context_parallel):
            bound = self.floors.of_layout(self.planner, layout, self.context_parallel)
            found.append(Item(bound, repr(layout), layout.group, Open(layout, bound)))
        return found

    def _candidates(self, layout: Layout, least: float) -> list[Item]:
        found = []
        for choice in self._choices():
            candidate = Candidate(layout, choice, self.context_parallel)
            bound = max(least, self.floors.of_candidate(self.planner, candidate))
            number, name = simplicity(candidate)
            found.append(Item(bound, f"{number:02} {name}", layout.group, candidate))
        return found

    def _choices(self) -> list[Choice]:
        planner = self.planner
        names = activation_names(planner.config, planner.offer)
        return choices(planner.config, names, planner.assumptions.vision_share)
