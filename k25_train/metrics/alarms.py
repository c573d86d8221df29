"""Alarms: steps that differ from those before in a way that somebody should look at.

```
 row of a step ──► signals: value, what is usual, whether it is beyond the limit
                      │  beyond it, and not so in the steps before: an alarm
                      └► then the value joins what is usual, so that a lasting change is told once
```
Rank 0 alone judges: rows are on no other. What is usual is rebuilt from `metrics.jsonl` when a run goes on.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from k25_train.config.metrics import AlarmConfig
from k25_train.config.model import ModelConfig
from k25_train.metrics.baseline import Baseline
from k25_train.metrics.sinks import Row, is_finite, number
from k25_train.run_folder.alarm_rows import Alarm, AlarmKind

WARM_UP_STEPS = 3
"""First steps of a process, whose time says nothing."""
SLOW_STEPS = 3
"""Steps whose median time has to be beyond the limit: a single slow one is no drop. Source: our choice."""
REST_STEPS = 5
"""Steps within the limits after which the next one beyond is another alarm. Source: our choice."""
FEWEST_TOKENS = 32
"""Tokens that an expert gets on average, without which none says nothing: of balanced experts, one in e^32
would have none. Source: our choice."""
GRAD_NORM, SOURCE_WEIGHT = "grad_norm", "source_weight/"


@dataclass(frozen=True, slots=True)
class Signal:
    """One figure of a step next to what it usually is."""

    kind: AlarmKind
    part: str
    value: float
    usual: float
    is_beyond: bool
    """Whether it is beyond the limit."""


class Alarms:
    """Judges the rows of a run one after the other."""

    def __init__(self, config: AlarmConfig, model: ModelConfig) -> None:
        self._config = config
        self._choices_per_token = model.num_experts_per_token
        self._num_experts = model.num_experts
        self._loss, self._load, self._seconds = Baseline(), Baseline(), Baseline()
        self._norms: defaultdict[str, Baseline] = defaultdict(Baseline)
        self._latest_seconds: deque[float] = deque(maxlen=SLOW_STEPS)
        """Per token, of the latest steps that nothing disturbed."""
        self._num_steps = 0
        """Steps of this process."""
        self._rests: dict[tuple[AlarmKind, str], int] = {}
        """Alarm -> steps since it was last beyond its limit; what is not here has rested long enough."""

    def recall(self, rows: Iterable[Row]) -> None:
        """Go on as after these rows, which an earlier part of the run has written."""
        for row in rows:
            if "loss" in row:
                self._judge(row, is_disturbed=False)
        self._num_steps = 0
        self._latest_seconds.clear()

    def judge(self, row: Row, *, is_disturbed: bool) -> list[Alarm]:
        """The alarms of a step, mostly none.

        Args:
            row: of the step.
            is_disturbed: whether an evaluation or a save has slowed the step down.
        """
        return self._judge(row, is_disturbed=is_disturbed or self._num_steps < WARM_UP_STEPS)

    def _judge(self, row: Row, *, is_disturbed: bool) -> list[Alarm]:
        # 1. Another mixture has other losses.
        if any(key.startswith(SOURCE_WEIGHT) for key in row):
            self._loss.forget()
        # 2. Every signal before this step becomes usual; a whole list, so that each has joined.
        signals = [*self._of_loss(row), *self._of_norms(row), *self._of_experts(row)]
        if not is_disturbed:
            signals += self._of_throughput(row)
        self._num_steps += 1
        # 3. What is beyond its limit for the first time in a while.
        beyond = [each for each in signals if each.is_beyond and (each.kind, each.part) not in self._rests]
        self._count_rests({(each.kind, each.part): each.is_beyond for each in signals})
        step = int(number(row["step"]))
        return [Alarm(step, each.kind, each.part, each.value, each.usual) for each in beyond]

    def _count_rests(self, is_beyond: dict[tuple[AlarmKind, str], bool]) -> None:
        for key, beyond in is_beyond.items():
            if beyond:
                self._rests[key] = 0
            elif key in self._rests:
                self._rests[key] += 1
                if self._rests[key] >= REST_STEPS:
                    del self._rests[key]

    def _of_loss(self, row: Row) -> Iterator[Signal]:
        factor, loss, known = self._config.loss_spike, number(row["loss"]), self._loss
        if factor is not None and known.is_known and is_finite(loss):
            is_beyond = loss > known.usual + factor * known.deviation
            yield Signal(AlarmKind.loss_spike, "", loss, known.usual, is_beyond)
        known.add(loss)

    def _of_norms(self, row: Row) -> Iterator[Signal]:
        # Rows of earlier versions have the norm of the whole alone.
        keys = [key for key in row if key.startswith(f"{GRAD_NORM}/")] or [
            key for key in row if key == GRAD_NORM
        ]
        for key in keys:
            part = key.removeprefix(GRAD_NORM).removeprefix("/")
            factor, norm, known = self._config.grad_spike, number(row[key]), self._norms[part]
            if factor is not None and known.is_known and is_finite(norm):
                # A part that nothing has reached, as a tower before the first images, has no usual norm.
                is_beyond = 0 < factor * known.usual < norm
                yield Signal(AlarmKind.grad_spike, part, norm, known.usual, is_beyond)
            known.add(norm)

    def _of_experts(self, row: Row) -> Iterator[Signal]:
        limit, known = self._config.expert_load, self._load
        if "expert_load" not in row or "dead_experts" not in row:
            return
        load, dead = number(row["expert_load"]), number(row["dead_experts"])
        mean = number(row.get("tokens", 0)) * self._choices_per_token / self._num_experts
        if limit is not None and known.is_known and is_finite(load):
            yield Signal(AlarmKind.expert_load, "", load, known.usual, load > limit)
            yield Signal(AlarmKind.dead_experts, "", dead, 0.0, dead > 0 and mean >= FEWEST_TOKENS)
        known.add(load)

    def _of_throughput(self, row: Row) -> Iterator[Signal]:
        factor, known = self._config.throughput, self._seconds
        tokens_per_s = number(row.get("tokens_per_s", 0.0))
        if not tokens_per_s > 0:
            return
        self._latest_seconds.append(1 / tokens_per_s)
        seconds = median(self._latest_seconds)
        if factor is not None and known.is_known and len(self._latest_seconds) == SLOW_STEPS:
            is_beyond = seconds > factor * known.usual
            yield Signal(AlarmKind.throughput, "", 1 / seconds, 1 / known.usual, is_beyond)
        known.add(1 / tokens_per_s)
