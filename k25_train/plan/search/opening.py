"""What workers do: open groups into layouts, layouts into candidates, and plan those; torch-free."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from k25_train.config.optimizer import OptimizerOffload
from k25_train.plan.memory.room import MARGIN_SHARE
from k25_train.plan.search.best_first import Item
from k25_train.plan.search.candidates import activation_names, simplicity
from k25_train.plan.search.space import Candidate, Choice, Group, Layout, choices, layouts_of
from k25_train.plan.search.trial import Planner, Trial
from k25_train.units import GB

INFINITE = float("inf")
SOONER = 0.93
"""By what a candidate's bound is multiplied for its turn. Our choice."""


class Floors(Protocol):
    """The least seconds of a step."""

    def of_layout(self, planner: Planner, layout: Layout, activation: str) -> float:
        """Of every candidate with a layout and activation policies."""

    def of_candidate(self, planner: Planner, candidate: Candidate) -> float:
        """Of one candidate; `of_layout` counts, too."""

    def states_bytes(self, planner: Planner, candidate: Candidate) -> float:
        """What a candidate's fullest device holds from step to step, whatever is done with activations."""

    def device_bytes(self, planner: Planner, candidate: Candidate) -> float:
        """What it holds at least in all, with a candidate's activations."""


@dataclass(frozen=True, slots=True)
class Open:
    """A group or a layout to open."""

    what: Group | Layout
    """What it is."""
    bound: float
    """What the items in it have at least."""
    activations: tuple[str, ...] = ()
    """Of a layout: policies of activations for which there may be room."""
    is_bounded: bool = False
    """Of a group: whether its bound is known; whether it has the room takes longer to find."""


@dataclass(frozen=True)
class Work:
    """Does what an item is for. Can be sent to another process."""

    planner: Planner
    """Plans candidates."""
    floors: Floors
    """Bounds of candidates."""
    is_tight: bool
    """Whether candidates count that leave no margin."""

    def __call__(self, what: Open | Candidate) -> "Opened | Trial":
        """The items in a group or layout, or the plan of a candidate."""
        if isinstance(what, Candidate):
            return self.planner.plan(what, times_tight=self.is_tight)
        if isinstance(what.what, Group):
            return self._layouts(what.what) if what.is_bounded else self._bounded(what.what)
        return self._candidates(what.what, what.bound, what.activations)

    def num_candidates(self, group: Group) -> int:
        """Candidates of a group."""
        layouts = layouts_of(self.planner.config, group)
        return sum(1 for _ in layouts) * len(self._choices)

    def _bounded(self, group: Group) -> "Opened":
        """The group itself, with the least seconds that its layouts take, if its states have room."""
        layouts = list(layouts_of(self.planner.config, group))
        if not layouts:
            return Opened([], 0.0)
        offloaded = self.planner.least_choice._replace(offload=OptimizerOffload.cpu)
        states_bytes = self._states(layouts[0], offloaded)
        if states_bytes > self._limit:
            return Opened([], states_bytes)
        # Other activation policies only add kernels.
        name = self.planner.least_choice.activation
        bound = min(self.floors.of_layout(self.planner, layout, name) for layout in layouts)
        item = Item(bound, "", bound, group.key, Open(group, bound, is_bounded=True))
        return Opened([item], states_bytes)

    def _layouts(self, group: Group) -> "Opened":
        layouts = list(layouts_of(self.planner.config, group))
        # 1. What there is room for: the fewest micro-batches wait where nothing overlaps.
        offloaded = self.planner.least_choice._replace(offload=OptimizerOffload.cpu)
        states_bytes = self._states(layouts[0], offloaded)
        first = {_of_memory(layout): layout for layout in reversed(layouts)}
        least_bytes = {
            (key, name): self._device(layout, offloaded._replace(activation=name))
            for key, layout in first.items()
            for name in self._names
            if states_bytes <= self._limit
        }
        # 2. Bounds for what is left.
        found = list[Item]()
        for layout in layouts:
            key = _of_memory(layout)
            names = [name for name in self._names if least_bytes.get((key, name), INFINITE) <= self._limit]
            if names:
                bound = min(self.floors.of_layout(self.planner, layout, name) for name in names)
                found.append(Item(bound, "", bound, layout.group, Open(layout, bound, tuple(names))))
        return Opened(found, min(least_bytes.values(), default=states_bytes))

    def _candidates(self, layout: Layout, least: float, names: tuple[str, ...]) -> "Opened":
        found, limit = [], self._limit
        places = [
            (name, offload)
            for name, offload in itertools.product(names, OptimizerOffload)
            if self._device(layout, self.planner.least_choice._replace(activation=name, offload=offload))
            <= limit
        ]
        for choice in self._choices:
            if (choice.activation, choice.offload) not in places:
                continue
            candidate = Candidate(layout, choice)
            bound = max(least, self.floors.of_candidate(self.planner, candidate))
            found.append(item_of(candidate, bound))
        return Opened(found, 0.0)

    @property
    def _limit(self) -> float:
        memory_gb = self.planner.config.cluster.gpu_memory_gb
        if memory_gb is None:
            return INFINITE
        return memory_gb * GB * (1 if self.is_tight else 1 - MARGIN_SHARE)

    def _states(self, layout: Layout, choice: Choice) -> float:
        return self.floors.states_bytes(self.planner, Candidate(layout, choice))

    def _device(self, layout: Layout, choice: Choice) -> float:
        return self.floors.device_bytes(self.planner, Candidate(layout, choice))

    @cached_property
    def _names(self) -> list[str]:
        return activation_names(self.planner.config, self.planner.offer)

    @cached_property
    def _choices(self) -> list[Choice]:
        return choices(self.planner.config, self._names, self.planner.assumptions.vision_share)


def _of_memory(layout: Layout) -> tuple[object, ...]:
    """What bounds on memory depend on, of the layouts of a group."""
    return layout.micro_batch_size, layout.dispatcher, layout.exchange


def item_of(candidate: Candidate, bound: float) -> Item:
    """A candidate to try. Its bound is closer than those of layouts, so that its turn comes a little sooner,
    and there is something to compare with."""
    number, name = simplicity(candidate)
    return Item(SOONER * bound, f"{number:02} {name}", bound, candidate.layout.group, candidate)


@dataclass(frozen=True, slots=True)
class Opened:
    """What is in a group or in a layout."""

    items: list[Item]
    """Layouts or candidates; none of those whose states alone are too large."""
    states_bytes: float
    """Of a group: what its candidates hold on a device at least."""
