"""Alarms as rows of metrics hold them: numbers under names of their own, as everything in a row is.

`alarm/KIND` is the value that raised it and `alarm_usual/KIND` what it was compared with, KIND as
`loss_spike` or `grad_spike/vision_tower`. Who shows alarms need not know how they are raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from k25_train.run_folder.rows_file import Row, is_number

VALUE, USUAL = "alarm/", "alarm_usual/"


class AlarmKind(Enum):
    """What raises an alarm."""

    loss_spike = "loss_spike"
    """A training loss far above those before."""
    grad_spike = "grad_spike"
    """A gradient norm, of a part of the model, far above those before."""
    expert_load = "expert_load"
    """An expert with many times the tokens of the others of its layer."""
    dead_experts = "dead_experts"
    """Experts without any token of the global batch."""
    throughput = "throughput"
    """Fewer tokens per second than before."""


REMEDIES = {
    AlarmKind.loss_spike: (
        "look at the data of this step and at the gradient norms of the parts; if losses stay high, start "
        "again from an earlier checkpoint with a lower optim.lr"
    ),
    AlarmKind.grad_spike: "if it comes again, clip this part by itself, or lower its rate (lr_scale)",
    AlarmKind.expert_load: "if it lasts, raise model.expert_bias_update_rate or model.balance_loss_coeff",
    AlarmKind.dead_experts: "if it lasts, raise model.expert_bias_update_rate or model.balance_loss_coeff",
    AlarmKind.throughput: (
        "see whether data_wait_s or memory grew; train.trace_step=N shows which rank is waited for, "
        "`python -m launch.preflight` whether a node is slow"
    ),
}
"""What to do about each."""
_WORDS = {
    AlarmKind.loss_spike: ("the loss is {:.4g} nats", "{:.4g} is usual"),
    AlarmKind.grad_spike: ("the gradient norm is {:.4g}", "{:.4g} is usual"),
    AlarmKind.expert_load: ("an expert has {:.3g} times the tokens of its layer's mean", "{:.3g} are usual"),
    AlarmKind.dead_experts: ("{:.0f} experts got no token", "{:.0f} are usual"),
    AlarmKind.throughput: ("{:,.4g} tokens/s", "{:,.4g} are usual"),
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """What one step gave cause for."""

    step: int
    kind: AlarmKind
    part: str
    """Part of the model; empty where it is of the whole."""
    value: float
    """Of the step, in the unit of the figure."""
    usual: float
    """What it was compared with, of the steps before."""

    @property
    def name(self) -> str:
        """How rows call it."""
        return f"{self.kind.value}/{self.part}" if self.part else self.kind.value

    @property
    def short(self) -> str:
        """What happened, in one line."""
        value, usual = _WORDS[self.kind]
        name = self.kind.value.replace("_", " ") + (f" of {self.part}" if self.part else "")
        return f"{name}: {value.format(self.value)}, {usual.format(self.usual)}"

    @property
    def text(self) -> str:
        """The whole line: step, value, what is usual, remedy."""
        return f"alarm: step {self.step}: {self.short}; {REMEDIES[self.kind]}"


def figures(alarms: Iterable[Alarm]) -> dict[str, float]:
    """What the row of their step has of alarms."""
    found = list(alarms)
    return {f"{VALUE}{each.name}": each.value for each in found} | {
        f"{USUAL}{each.name}": each.usual for each in found
    }


def alarms_of(row: Row) -> Iterator[Alarm]:
    """The alarms of a row; what is none, or of a kind of later versions, is passed over."""
    kinds = {kind.value: kind for kind in AlarmKind}
    for key, value in row.items():
        kind, _, part = key.removeprefix(VALUE).partition("/")
        if not key.startswith(VALUE) or kind not in kinds:
            continue
        raised, usual = _finite(value), _finite(row.get(f"{USUAL}{key.removeprefix(VALUE)}"))
        step = _finite(row.get("step"))
        if raised is not None and usual is not None and step is not None:
            yield Alarm(int(step), kinds[kind], part, raised, usual)


def _finite(value: object) -> float | None:
    """A number that can be shown; None for anything else, as a damaged file may hold it."""
    try:
        return float(value) if is_number(value) and math.isfinite(value) else None
    except OverflowError:
        return None
