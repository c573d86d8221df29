"""What a step would take, and whether it would fit, if something were otherwise; torch-free.

A what-if changes one thing of a configuration or of what is assumed, and plans each of its values with the
same functions as the configuration itself. Rules of training are asked first.
"""

from dataclasses import dataclass

from k25_train.plan.cause import Cause
from k25_train.plan.context import with_exchange
from k25_train.plan.memory.verdict import Fit, MemoryVerdict, judge_memory
from k25_train.plan.offer import Offer
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.step_plan import StepPlan
from k25_train.plan.variants import Variant, WhatIfKind, title_of, variants_of, with_shared_sequences
from k25_train.units import GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One value of what is otherwise, planned."""

    variant: Variant
    """What was planned."""
    step: StepPlan | None
    """The time of a step; None if training would refuse the configuration."""
    memory: MemoryVerdict | None
    """Whether it fits; None if training would refuse it."""
    verdict: str
    """Whether it can be trained, with what is left or missing, and what would help."""
    limit: str
    """What takes the most of a step next to the model's computation."""

    @property
    def name(self) -> str:
        """What is otherwise."""
        return self.variant.name

    @property
    def peak_gb(self) -> float | None:
        """What the fullest device holds, in units of 1e9 bytes."""
        return None if self.memory is None else self.memory.device_bytes / GB

    @property
    def is_possible(self) -> bool:
        """Whether it can be trained."""
        return self.memory is not None and self.memory.fit is not Fit.does_not_fit

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts of the columns."""
        if self.step is None or self.peak_gb is None:
            return (self.name, "", "", "", "", self.verdict, "")
        return (
            self.name,
            f"{self.step.tokens_per_s_per_gpu:,.0f}",
            f"{self.step.mfu:.1%}",
            f"{self.step.step_s:,.2f}",
            f"{self.peak_gb:.1f}",
            self.verdict,
            self.limit,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A table of what would be."""

    kind: WhatIfKind
    """What is otherwise."""
    title: str
    """What the table shows, and what stays the same."""
    columns: tuple[str, ...]
    """Headings of `Row.cells`."""
    rows: tuple[Row, ...]
    """One for each value."""


def what_if(kind: WhatIfKind, pipeline: PipelinePlan, offer: Offer, *, seeks_remedy: bool = True) -> WhatIf:
    """Plan every value of what is otherwise.

    Args:
        kind: what that is.
        pipeline: what is configured.
        offer: devices to choose from, and the rules of training.
        seeks_remedy: whether to look for what makes a value fit that does not; plots have no use for it.
    """
    columns = (kind.value, "tokens/s/GPU", "MFU", "step s", "peak GB", "verdict", "next to computation")
    rows = []
    for variant in variants_of(kind, pipeline, offer):
        # What a mechanism is worth says what is missing without it: no remedy has to be looked for.
        seeks = seeks_remedy and kind is not WhatIfKind.mechanisms
        row = planned(variant, offer, seeks_remedy=seeks)
        rows.append(row)
        if kind is WhatIfKind.length and not row.is_possible:
            rows += _shared_sequences(variant, offer)
    return WhatIf(kind=kind, title=title_of(kind, pipeline), columns=columns, rows=tuple(rows))


def _shared_sequences(variant: Variant, offer: Offer) -> list[Row]:
    """The fewest ranks by which sequences have to be shared; nothing if none are enough."""
    for shared in with_shared_sequences(variant):
        row = planned(shared, offer, seeks_remedy=False)
        if row.is_possible:
            return [row]
    return []


def planned(variant: Variant, offer: Offer, *, seeks_remedy: bool = True) -> Row:
    """The row of a variant."""
    problems = offer.find_problems(variant.config)
    if problems:
        first = problems[0]
        verdict = _joined(variant.note, f"{first.key} {first.rule}; {first.remedy}")
        return Row(variant=variant, step=None, memory=None, verdict=verdict, limit="")
    pipeline = plan_pipeline(with_exchange(variant.config), assumptions=variant.assumptions)
    memory, step = judge_memory(pipeline, seeks_remedy=seeks_remedy), plan_step(pipeline)
    verdict = _joined(fit_in_words(memory), variant.note)
    return Row(variant=variant, step=step, memory=memory, verdict=verdict, limit=limit_in_words(step))


def fit_in_words(memory: MemoryVerdict) -> str:
    """Whether it fits, with what is left or missing and what would help."""
    text, margin = memory.fit.value, memory.margin_bytes
    if margin is not None:
        left_gb = min(margin, memory.node_limit_bytes - memory.node_bytes) / GB
        of = "a node" if memory.node_limit_bytes - memory.node_bytes < margin else f"stage {memory.stage}"
        text += f": {left_gb:.1f} GB left of {of}" if left_gb >= 0 else f": {-left_gb:.1f} GB missing on {of}"
    remedy = memory.remedy
    if remedy is not None and remedy.overrides and remedy.fits:
        text += f"; {' '.join(remedy.overrides)} {'fits' if remedy.fit is Fit.fits else 'is tight'}"
    elif remedy is not None and memory.fit is Fit.does_not_fit:
        text += "; no change of policies helps"
    return text


def limit_in_words(step: StepPlan) -> str:
    """What takes the most of a step next to the model's computation."""
    parts = [part for part in step.parts if part.cause is not Cause.compute]
    if not parts:
        return ""
    largest = max(parts, key=lambda part: part.seconds)
    return f"{largest.cause.value} {largest.seconds / step.step_s:.1%}"


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)
