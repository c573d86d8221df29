"""Runs in a table: their figures at common steps, and how far the others are from the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from k25_train.metrics.compare.runs import ComparedRun
from k25_train.metrics.sinks import number
from k25_train.run_folder.rows_file import Row, is_number

MOST_STEPS = 8
"""Common steps that are shown, evenly spread, the last one among them."""
FIGURES = (
    "loss",
    "eval_text_loss",
    "eval_caption_loss",
    "eval_reward",
    "eval_response_tokens",
    "reward",
    "response_tokens",
    "grad_norm",
    "max_logit",
    "expert_load",
    "dead_experts",
    "tokens_per_s",
    "mfu",
)
FAMILIES = ("eval_loss/", "loss/", "grad_norm/", "weight_norm/")
"""Figures that are compared at the last common step that has them; of families, each member."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of all runs at one step."""

    figure: str
    step: int
    values: tuple[float | None, ...]
    """[run] -> value; None where it has none."""

    def off(self, run: int) -> float | None:
        """By which share a run's value is above the first one's; None if that cannot be said."""
        first, value = self.values[0], self.values[run]
        return value / first - 1 if first and value is not None else None


def rows_by_step(run: ComparedRun) -> Mapping[int, Row]:
    """The rows of steps that were trained."""
    return {int(number(row["step"])): row for row in run.rows}


def common_steps(runs: Sequence[ComparedRun]) -> list[int]:
    """Steps of which every run has a loss."""
    steps = [{step for step, row in rows_by_step(run).items() if is_number(row.get("loss"))} for run in runs]
    return sorted(set.intersection(*steps))


def losses_at_steps(runs: Sequence[ComparedRun]) -> list[Compared]:
    """Losses at some common steps."""
    steps, rows = common_steps(runs), [rows_by_step(run) for run in runs]
    number_shown = min(MOST_STEPS, len(steps))
    chosen = sorted(
        {steps[round(index * len(steps) / number_shown) - 1] for index in range(1, number_shown + 1)}
    )
    return [_compared("loss", step, rows) for step in chosen]


def figures_at_the_end(runs: Sequence[ComparedRun]) -> list[Compared]:
    """Every figure, each at the last step at which at least two runs have it, all of them if possible."""
    rows = [rows_by_step(run) for run in runs]
    keys = dict.fromkeys(key for of_run in rows for row in of_run.values() for key in row)
    members = [key for family in FAMILIES for key in keys if key.startswith(family)]
    found = (_latest(key, rows) for key in [*FIGURES, *members])
    return [each for each in found if each is not None]


def _latest(key: str, rows: Sequence[Mapping[int, Row]]) -> Compared | None:
    having = [{step for step, row in of_run.items() if is_number(row.get(key))} for of_run in rows]
    shared = set.intersection(*having) or {
        step for step in set.union(*having) if sum(step in each for each in having) > 1
    }
    return _compared(key, max(shared), rows) if shared else None


def _compared(key: str, step: int, rows: Sequence[Mapping[int, Row]]) -> Compared:
    values = (of_run.get(step, {}).get(key) for of_run in rows)
    return Compared(key, step, tuple(float(value) if is_number(value) else None for value in values))


def cells(compared: Compared, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Heading and text of each column."""
    yield "figure", compared.figure
    yield "step", f"{compared.step:,}"
    for index, (name, value) in enumerate(zip(names, compared.values, strict=True)):
        off = compared.off(index) if index else None
        text = "" if value is None else f"{value:.5g}"
        yield name, text if off is None else f"{text} ({off:+.1%})"
