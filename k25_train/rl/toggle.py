"""Toggle: phases with and without a budget of tokens alternate, so that responses get short and stay right.

    start pass       samples of each problem ─► lengths of the correct ones ─► budget: their percentile ρ
    phase 0, budget  r̃ = r · [mean accuracy of the group < λ  or  |y| ≤ budget]
    phase 1, free    r̃ = r
                     m steps each, phase 0 first

Source: K2.5, section 4.4. |y| counts sampled tokens alone: neither what tools return nor what others write.
A problem is what shares a budget: a prompt, or all generated tasks of equal difficulty (`Task.problem`).

A group keeps the phase that it was admitted in, however late it is trained: what it was sampled for does not
change under it. All of this is arithmetic on plain values; the state is in the checkpoint.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from k25_train.config.algorithm import ToggleConfig

STATE_VERSION = 1
"""Of what `to_json` gives."""


class Phase(StrEnum):
    """What rewards are held against."""

    BUDGET = "budget"
    """The number of tokens; the report's phase 0."""
    FREE = "free"
    """Nothing; its phase 1."""


class StartSample(NamedTuple):
    """A response of the start pass, judged."""

    problem: str
    """Whose budget it counts for."""
    num_tokens: int
    """Sampled tokens."""
    is_correct: bool
    """Whether its answer is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToggleGroup:
    """The responses to one prompt, judged."""

    problem: str
    """Whose budget holds."""
    phase: Phase
    """Of the step that the group was admitted for."""
    rewards: Sequence[float]
    """[K] reward of each response; NaN where it is unscored."""
    accuracies: Sequence[float]
    """[K] what each answer is worth, 0 to 1; NaN where it is unscored."""
    num_tokens: Sequence[int]
    """[K] sampled tokens of each."""


class Toggle(Protocol):
    """Alternating phases; `NoToggle` has none."""

    def start_tasks(self, problems: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
        """What the start pass has to sample, as (task, number of the sample of this task).

        Args:
            problems: problem -> numbers of its tasks.
        """

    def estimate(self, samples: Iterable[StartSample]) -> None:
        """Set the budgets, once. Raises ValueError if they are set."""

    @property
    def is_estimated(self) -> bool:
        """Whether nothing is left to be estimated."""

    def phase(self, step: int) -> Phase:
        """The phase of a step, 1 or later, which groups are stamped with when they are admitted."""

    def rewards(self, group: ToggleGroup) -> list[float]:
        """[K] the rewards that are trained on; unscored ones stay NaN."""

    def figures(self, groups: Sequence[ToggleGroup]) -> dict[str, float]:
        """What the row of a step says of its groups."""

    def to_json(self) -> dict[str, Any]:
        """The state, for a checkpoint."""


class NoToggle:
    """No budgets: every phase is free."""

    is_estimated = True

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        """`kept`: the state of a run in which Toggle was on, to be kept until it is on again."""
        self._kept = dict(kept) if kept is not None else {"version": STATE_VERSION, "budgets": None}

    def start_tasks(self, problems: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
        """See `Toggle`: there is no start pass."""
        return []

    def estimate(self, samples: Iterable[StartSample]) -> None:
        """See `Toggle`."""

    def phase(self, step: int) -> Phase:
        """See `Toggle`."""
        return Phase.FREE

    def rewards(self, group: ToggleGroup) -> list[float]:
        """See `Toggle`: as they are."""
        return list(group.rewards)

    def figures(self, groups: Sequence[ToggleGroup]) -> dict[str, float]:
        """See `Toggle`."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """See `Toggle`."""
        return self._kept


class AlternatingPhases:
    """Toggle as in the report."""

    def __init__(self, config: ToggleConfig) -> None:
        self._config = config
        self._budgets: dict[str, int] | None = None

    def start_tasks(self, problems: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
        """See `Toggle`: `samples` of each problem, its tasks in turn."""
        return [
            (numbers[sample % len(numbers)], sample // len(numbers))
            for numbers in problems.values()
            for sample in range(self._config.samples)
        ]

    def estimate(self, samples: Iterable[StartSample]) -> None:
        """See `Toggle`."""
        if self._budgets is not None:
            raise ValueError("budgets are estimated once, before the first step")
        lengths: dict[str, list[int]] = {}
        for sample in samples:
            if sample.is_correct:
                lengths.setdefault(sample.problem, []).append(sample.num_tokens)
        self._budgets = {
            problem: lower_percentile(found, self._config.percentile)
            for problem, found in sorted(lengths.items())
            if len(found) >= self._config.min_correct
        }

    @property
    def is_estimated(self) -> bool:
        """See `Toggle`."""
        return self._budgets is not None

    def budget(self, problem: str) -> float:
        """Tokens that a response may have; inf for a problem with too few correct ones to tell.

        Raises ValueError before the start pass.
        """
        if self._budgets is None:
            raise ValueError("budgets are not estimated yet: the start pass comes first")
        return self._budgets.get(problem, math.inf)

    def phase(self, step: int) -> Phase:
        """See `Toggle`. Raises ValueError for steps that are not counted from 1."""
        if step < 1:
            raise ValueError(f"steps are counted from 1, not {step}")
        return (Phase.BUDGET, Phase.FREE)[(step - 1) // self._config.interval % 2]

    def rewards(self, group: ToggleGroup) -> list[float]:
        """See `Toggle`: 0 for what is over budget, where the budget counts."""
        if group.phase is Phase.FREE or not self._is_solved(group):
            return list(group.rewards)
        budget = self.budget(group.problem)
        pairs = zip(group.rewards, group.num_tokens, strict=True)
        return [reward if tokens <= budget or math.isnan(reward) else 0.0 for reward, tokens in pairs]

    def figures(self, groups: Sequence[ToggleGroup]) -> dict[str, float]:
        """See `Toggle`; what there is nothing to say of is left out.

        `toggle/phase`: 0 or 1 as in the report, the mean over groups. `toggle/budget_tokens`: mean over
        groups that have one. `toggle/over_budget_share`: of all responses, whether or not it counts.
        `toggle/gated_share`: groups in phase 0 that are solved too rarely for their budget to count.
        """
        found = {"toggle/phase": _mean([float(group.phase is Phase.FREE) for group in groups])}
        budgets = [self.budget(group.problem) for group in groups]
        found["toggle/budget_tokens"] = _mean([budget for budget in budgets if math.isfinite(budget)])
        found["toggle/over_budget_share"] = _mean(
            [
                float(tokens > budget)
                for group, budget in zip(groups, budgets, strict=True)
                for tokens in group.num_tokens
            ]
        )
        budgeted = [group for group in groups if group.phase is Phase.BUDGET]
        found["toggle/gated_share"] = _mean([float(not self._is_solved(group)) for group in budgeted])
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """See `Toggle`. The phase is a function of the step and is not in it."""
        return {"version": STATE_VERSION, "budgets": self._budgets}

    @classmethod
    def from_json(cls, config: ToggleConfig, state: Mapping[str, Any]) -> "AlternatingPhases":
        """Go on from `to_json`. Raises ValueError or KeyError for anything else."""
        _check_version(state)
        toggle = cls(config)
        budgets = state["budgets"]
        if budgets is not None:
            toggle._budgets = {str(problem): int(tokens) for problem, tokens in budgets.items()}
        return toggle

    def _is_solved(self, group: ToggleGroup) -> bool:
        """Whether the mean accuracy of the scored responses reaches λ."""
        return _mean([value for value in group.accuracies if not math.isnan(value)]) >= self._config.accuracy


def make_toggle(config: ToggleConfig, state: Mapping[str, Any] | None = None) -> Toggle:
    """Toggle of a configuration, at its beginning or as a checkpoint has it.

    A state with budgets is kept unused while Toggle is off; one without them, of a run that was off from its
    start, has the start pass done before the next step. Raises ValueError or KeyError for what is no state.
    """
    if not config.enabled:
        if state is not None:
            _check_version(state)
        return NoToggle(state)
    return AlternatingPhases(config) if state is None else AlternatingPhases.from_json(config, state)


def lower_percentile(lengths: Sequence[int], share: float) -> int:
    """The entry of the sorted lengths at the share of the way from first to last, rounded down: a length that
    occurred. Source: our choice among the forms of a percentile; the report names none."""
    return sorted(lengths)[math.floor(share * (len(lengths) - 1) + 1e-9)]


def _check_version(state: Mapping[str, Any]) -> None:
    if state["version"] != STATE_VERSION:
        raise ValueError(f"state of Toggle of version {state['version']}, known is {STATE_VERSION}")


def _mean(values: Sequence[float]) -> float:
    """NaN for none."""
    return sum(values) / len(values) if values else math.nan
