"""The fastest layouts that fit, out of all that training would take; torch-free.

Exact within its space: whatever is not planned has a bound above the last layout that is told. Where nothing
fits, context parallelism is assumed, which training cannot do, and the result says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k25_train.plan.offer import Offer
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.search import best_first, workers
from k25_train.plan.search.best_first import Answer, Found, Item
from k25_train.plan.search.candidates import simplicity
from k25_train.plan.search.opening import Floors, Open, Work
from k25_train.plan.search.space import Candidate, Group, groups
from k25_train.plan.search.trial import JudgeMemory, Outcome, Planner, PlanStep, Trial

NUM_RANKED = 6
"""Layouts that are told, the winner among them."""
MOST_ANSWERS = 20_000
"""Where a search gives up."""
CONTEXT_PARALLEL = (1, 2, 4, 8, 16, 32)
"""Ranks that share a sequence: tried one after the other until something fits."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    planner: Planner
    """What plans candidates, for whoever wants more than the numbers of a trial."""
    context_parallel: int
    """Ranks that share a sequence; 1 unless nothing fits otherwise."""
    configured: Trial
    """The plan of the configuration that the search started from."""
    ranked: list[Trial]
    """The best of each of the best groups of layouts, the winner first; empty if nothing fits."""
    closest: Trial | None
    """If nothing fits, what is missing the least."""
    groups: list[Group]
    """Every pp, vpp and ep, also those that are not possible."""
    floors: dict[tuple[int, int, int], float]
    """Group -> the least seconds of a step, by its bound."""
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
        most_answers: where the search gives up.
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
    for context_parallel in CONTEXT_PARALLEL:
        search = _Search(planner, floors, context_parallel, told)
        result = search.run(pipeline, num_ranked, num_workers, most_answers)
        found = found or result
        if result.ranked:
            return result
    assert found is not None
    return found


@dataclass
class _Search:
    """One pass over the space."""

    planner: Planner
    floors: Floors
    context_parallel: int
    told: Told
    trials: dict[Candidate, tuple[Item, Trial]] = field(default_factory=dict)
    group_floors: dict[Any, float] = field(default_factory=dict)

    def run(
        self, pipeline: PipelinePlan, num_ranked: int, num_workers: int | None, most_answers: int
    ) -> SearchResult:
        """Search, and keep what does not depend on the order of answers."""
        every = groups(self.planner.config, self.context_parallel)
        items = [Item(0.0, repr(group), group[:3], Open(group, 0.0)) for group in every if not group.why_not]
        work = Work(self.planner, self.floors, self.context_parallel)
        with workers.started(work, num_workers) as started:
            found = best_first.search(
                items,
                started,
                self.on_answer,
                num_best=num_ranked,
                most_answers=most_answers,
                told=self.tell,
            )
        counted = [trial for item, trial in self.trials.values() if found.needs(item)]
        counted.sort(key=_order)
        fitting = _best_of_groups(counted, Outcome.fits) or _best_of_groups(counted, Outcome.tight)
        too_large = [trial for trial in counted if trial.outcome is Outcome.too_large]
        return SearchResult(
            planner=self.planner,
            context_parallel=self.context_parallel,
            configured=self.planner.plan_configured(pipeline),
            ranked=fitting[:num_ranked],
            closest=None if fitting else max(too_large, key=_margin, default=None),
            groups=every,
            floors=dict(self.group_floors),
            trials=counted,
            num_candidates=sum(map(work.num_candidates, every)),
            num_planned=len(self.trials),
            is_complete=found.is_complete,
        )

    def on_answer(self, item: Item, answer: Any) -> Answer:
        """Note a plan, or hand on what an item was opened into."""
        if not isinstance(answer, Trial):
            if isinstance(item.what.what, Group):
                self.group_floors[item.group] = min((each.bound for each in answer), default=float("inf"))
            return answer
        self.trials[item.what] = item, answer
        return answer.step_s if answer.outcome is Outcome.fits else float("inf")

    def tell(self, found: Found, num_open: int) -> None:
        """Pass progress on."""
        self.told(len(self.trials), num_open, min(found.best.values(), default=float("inf")))


def _order(trial: Trial) -> tuple[float, int, str]:
    """By time; of equal times, which sums of floats may give differently, the simpler first."""
    return float(f"{trial.step_s:.9g}"), *simplicity(trial.candidate)


def _best_of_groups(trials: list[Trial], outcome: Outcome) -> list[Trial]:
    """The first of each group, of trials in their order."""
    best: dict[tuple[int, int, int], Trial] = {}
    for trial in trials:
        if trial.outcome is outcome:
            best.setdefault(trial.candidate.layout.group, trial)
    return list(best.values())


def _margin(trial: Trial) -> float:
    return float("-inf") if trial.margin_bytes is None else trial.margin_bytes
