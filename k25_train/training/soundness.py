"""Whether a step went well, which decides what may be done with the state after it."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k25_train.training.step import StepResult

_NUM_REMEMBERED = 64
_NUM_NEEDED = 16
"""Sound losses that a run needs before a jump over all of them counts, and how many it remembers.
Source: our choice."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step says of the state before and after it."""

    why_unsound: str = ""
    """What is wrong; empty if loss and gradient are finite, the update took place and no alarm was raised."""
    weights_were_ruined: bool = False
    """Whether a loss that no batch explains shows that the weights before the step were bad. A step that
    shows neither this nor was skipped proves them good, whatever the evaluation says of those after it."""
    was_skipped: bool = False
    """Whether weights are as before, since the gradient was not finite."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.why_unsound


class Soundness:
    """Judges the steps of a run one after the other, alike on every rank.

    Two alarms: a loss of more than twice that of guessing all tokens alike, ln(vocabulary), which weights do
    not reach by learning; and a loss that exceeds all of the last 64 by half as much as guessing. Source: our
    choice.
    """

    def __init__(self, vocab_size: int) -> None:
        self._guessing = math.log(vocab_size)
        self._losses: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    @property
    def losses(self) -> list[float]:
        """What the next losses are compared with, the latest last."""
        return list(self._losses)

    def recall(self, losses: Iterable[float]) -> None:
        """Go on as after these losses, which an earlier part of the run had."""
        self._losses.extend(losses)

    @property
    def limit(self) -> float:
        """Loss in nats per token above which the alarm is raised."""
        limit = 2 * self._guessing
        if len(self._losses) >= _NUM_NEEDED:
            limit = min(limit, max(self._losses) + 0.5 * self._guessing)
        return limit

    def judge(self, result: "StepResult") -> Verdict:
        """The verdict on a step."""
        if not result.updated or not math.isfinite(result.grad_norm):
            return Verdict("its gradient was not finite, so it was skipped", was_skipped=True)
        if not result.loss <= self.limit:
            why = (
                f"its loss was {result.loss:.4g} nats, though {self.limit:.4g} is the limit of what is sound"
            )
            return Verdict(why, weights_were_ruined=True)
        self._losses.append(result.loss)
        return Verdict()

    def judge_evaluation(self, verdict: Verdict, evaluation: Mapping[str, float]) -> Verdict:
        """The verdict on a step, with what the evaluation of the weights after it adds, if there was one."""
        for name, loss in evaluation.items():
            # One source may be noise; all of them together are not. Figures of rollouts are no losses.
            is_loss = name.endswith("loss")
            if verdict.is_sound and is_loss and not loss <= 2 * self._guessing:
                return Verdict(f"after it {name} was {loss:.4g} nats, more than guessing would give")
        return verdict
