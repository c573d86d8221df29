"""The fastest layouts that fit, out of all that training would take; torch-free.

Exact within its space: whatever is not planned has a bound above the last layout that is told.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from k25_train.plan.memory.verdict import MemoryVerdict, judge_memory
from k25_train.plan.offer import Offer
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.search import best_first, workers
from k25_train.plan.search.best_first import NOTHING, Answer, Found, Item
from k25_train.plan.search.candidates import activation_names, candidate_of, simplicity
from k25_train.plan.search.floor import KernelFloors
from k25_train.plan.search.opening import Floors, Open, Opened, Work, item_of
from k25_train.plan.search.space import Candidate, Group, GroupKey, choices, groups, layouts_of
from k25_train.plan.search.trial import JudgeMemory, Outcome, Planner, PlanStep, Trial
from k25_train.plan.time.plan_step import plan_step

NUM_RANKED = 6
"""Layouts that are told, the winner among them."""
WINDOW = 0.02
"""Share by which their steps may take longer than the winner's."""
MOST_ANSWERS = 20_000
MOST_S = 55.0
"""Answers and seconds after which a search gives up, and says so."""
FIRST = -1.0
"""Turn of what is tried before all bounds."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    planner: Planner
    """What plans candidates, for whoever wants more than the numbers of a trial."""
    configured: Trial
    """The plan of the configuration that the search started from."""
    ranked: list[Trial]
    """The best of each of the best groups of layouts, the winner first; empty if nothing fits."""
    closest: Trial | None
    """If nothing fits, what is missing the least."""
    groups: list[Group]
    """Every pp, vpp, ep and cp, also those that are not possible."""
    floors: dict[GroupKey, float]
    """Group -> the least seconds of a step, by its bound."""
    states: dict[GroupKey, float]
    """Group -> the least bytes that its fullest device keeps from step to step."""
    trials: list[Trial]
    """Every plan that counts, whatever became of it: those whose bound is not above what is ranked."""
    num_candidates: int
    """Candidates in the space."""
    num_planned: int
    """Candidates that were planned; it depends on the number of workers."""
    is_complete: bool
    """Whether the search was not given up."""

    @property
    def winner(self) -> Trial | None:
        """The best; None if nothing fits."""
        return self.ranked[0] if self.ranked else None


Told = Callable[[int, int, float], None]
"""Called with the number of plans made, of items open, and the seconds of the best step so far."""


def search_layouts(
    pipeline: PipelinePlan,
    offer: Offer,
    *,
    num_workers: int | None = None,
    told: Told = lambda *_: None,
) -> SearchResult:
    """Search layouts for the nodes, model and batch of a pipeline's configuration, with the planner's own
    functions; arguments as of `find_layouts`."""
    return find_layouts(
        pipeline, offer, KernelFloors(), plan_step, judge_quickly, num_workers=num_workers, told=told
    )


def judge_quickly(pipeline: PipelinePlan) -> MemoryVerdict:
    """Whether a plan fits; nothing is tried to make it fit."""
    return judge_memory(pipeline, seeks_remedy=False)


def find_layouts(
    pipeline: PipelinePlan,
    offer: Offer,
    floors: Floors,
    plan_step: PlanStep,
    judge_memory: JudgeMemory,
    *,
    num_ranked: int = NUM_RANKED,
    num_workers: int | None = None,
    most_answers: int = MOST_ANSWERS,
    most_s: float = MOST_S,
    told: Told = lambda *_: None,
) -> SearchResult:
    """Search layouts for the nodes, model and batch of a pipeline's configuration.

    Args:
        pipeline: what was configured.
        offer: choices and rules.
        floors: bounds, picklable as all functions are that are passed.
        plan_step: the time of a step.
        judge_memory: whether it fits.
        num_ranked: how many layouts of different pp, vpp and ep are wanted.
        num_workers: processes; as many as there are cores if None.
        most_answers: of each pass over the space, after which the search gives up.
        most_s: seconds after which it gives up, whatever it has found to be too large until then.
        told: hears of progress.
    """
    planner = Planner(
        config=pipeline.config,
        assumptions=pipeline.assumptions,
        offer=offer,
        plan_step=plan_step,
        judge_memory=judge_memory,
    )
    found: SearchResult | None = None
    until_s = time.monotonic() + most_s
    for is_tight in (False, True):
        search = _Search(planner, floors, is_tight, told)
        result = search.run(pipeline, num_ranked, num_workers, most_answers, until_s)
        found = found or result
        if result.ranked:
            return result
        if time.monotonic() > until_s:
            return replace(found, is_complete=False)
    assert found is not None
    return found


@dataclass
class _Search:
    """One pass over the space."""

    planner: Planner
    floors: Floors
    is_tight: bool
    told: Told
    trials: dict[Candidate, tuple[Item, Trial]] = field(default_factory=dict)
    group_floors: dict[Any, float] = field(default_factory=dict)
    group_states: dict[Any, float] = field(default_factory=dict)

    def run(
        self,
        pipeline: PipelinePlan,
        num_ranked: int,
        num_workers: int | None,
        most_answers: int,
        until_s: float,
    ) -> SearchResult:
        """Search, and keep what does not depend on the order of answers."""
        every = groups(self.planner.config)
        items = [Item(0.0, "", 0.0, group.key, Open(group, 0.0)) for group in every if not group.why_not]
        items += self.configured(pipeline)
        work = Work(self.planner, self.floors, self.is_tight)
        with workers.started(work, num_workers) as started:
            found = best_first.search(
                items,
                started,
                self.on_answer,
                num_best=num_ranked,
                window=WINDOW,
                # What is configured comes first, and is planned whatever the time.
                gives_up=lambda number: number > 0 and (number >= most_answers or time.monotonic() > until_s),
                told=self.tell,
            )
        counted = [trial for item, trial in self.trials.values() if found.needs(item)]
        counted.sort(key=_order)
        wanted = (Outcome.fits, Outcome.tight) if self.is_tight else (Outcome.fits,)
        fitting = _best_of_groups(counted, wanted)
        too_large = [trial for trial in counted if trial.outcome is Outcome.too_large]
        return SearchResult(
            planner=self.planner,
            configured=self.planner.plan_configured(pipeline),
            ranked=[trial for trial in fitting if trial.step_s <= found.limit][:num_ranked],
            closest=None if fitting else max(too_large, key=_margin, default=None),
            groups=every,
            floors=dict(self.group_floors),
            states=dict(self.group_states),
            trials=counted,
            num_candidates=sum(map(work.num_candidates, every)),
            num_planned=len(self.trials),
            is_complete=found.is_complete,
        )

    def configured(self, pipeline: PipelinePlan) -> list[Item]:
        """What is configured, before anything else, and then its layout with every choice: they may be good
        already."""
        candidate = candidate_of(pipeline.config, self.planner.offer)
        layout, every = candidate.layout, groups(pipeline.config)
        own = [each for each in every if each.key == layout.group]
        if not any(layout in layouts_of(pipeline.config, group) for group in own):
            return []
        names = activation_names(pipeline.config, self.planner.offer)
        found = choices(pipeline.config, names, self.planner.assumptions.vision_share)
        others = [Candidate(layout, choice) for choice in found if choice != candidate.choice]
        return [
            replace(item_of(candidate, 0.0), rank=2 * FIRST),
            *(replace(item_of(each, 0.0), rank=FIRST) for each in others),
        ]

    def on_answer(self, item: Item, answer: Opened | Trial) -> Answer:
        """Note a plan, or hand on what an item was opened into."""
        if isinstance(answer, Opened):
            if isinstance(item.what.what, Group):
                self.group_states[item.group] = answer.states_bytes
                self.group_floors[item.group] = min(
                    (each.bound for each in answer.items), default=float("inf")
                )
            return answer.items
        # One that was tried to begin with may have its turn again.
        self.trials.setdefault(item.what, (item, answer))
        wanted = (Outcome.fits, Outcome.tight) if self.is_tight else (Outcome.fits,)
        return answer.step_s if answer.outcome in wanted else float("inf")

    def tell(self, found: Found, num_open: int) -> None:
        """Pass progress on."""
        self.told(len(self.trials), num_open, min(found.best.values(), default=NOTHING)[0])


def _order(trial: Trial) -> tuple[float, int, str]:
    """By time; of equal times, which sums of floats may give differently, the simpler first."""
    return float(f"{trial.step_s:.9g}"), *simplicity(trial.candidate)


def _best_of_groups(trials: list[Trial], outcomes: tuple[Outcome, ...]) -> list[Trial]:
    """The first of each group, of trials in their order."""
    best: dict[GroupKey, Trial] = {}
    for trial in trials:
        if trial.outcome in outcomes:
            best.setdefault(trial.candidate.layout.group, trial)
    return list(best.values())


def _margin(trial: Trial) -> float:
    return float("-inf") if trial.margin_bytes is None else trial.margin_bytes
