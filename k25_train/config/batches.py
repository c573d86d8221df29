"""How many sequences each step has: a ramp from small batches to the global one. Pure."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from k25_train.config.span import Span, SpanText, not_spans
from parallel.config import Problem, not_positive


@dataclass(slots=True, kw_only=True)
class BatchRampConfig:
    """The global batch grows from `start` by `increment` to `train.global_batch_size`; each size lasts for an
    equal part of `length`. As Megatron-LM's `--rampup-batch-size`, whose third number is `length` counted in
    sequences. Source: not disclosed, our choice."""

    start: int | None
    """Sequences of the first steps; null for no ramp."""
    increment: int
    """Sequences by which the batch grows."""
    length: SpanText
    """Steps or tokens until the batch is the global one."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        sizes = ("increment", "start") if self.start is not None else ("increment",)
        return not_positive(self, sizes) + not_spans(self, ("length",))


class _Stretch(NamedTuple):
    """Steps with one size of batch."""

    first_step: int
    size: int
    sequences_before: int


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """The size of every step's batch, a function of the step alone."""

    stretches: tuple[_Stretch, ...]
    """In order of steps; the last one goes on for ever."""
    seq_len: int
    """Tokens of a sequence."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that there is, in sequences, the smallest first."""
        return tuple(stretch.size for stretch in self.stretches)

    def size_of(self, step: int) -> int:
        """Sequences of a step, counted from 1."""
        return self._stretch(step).size

    def sequences_after(self, step: int) -> int:
        """Sequences of the first `step` steps together."""
        stretch = self._stretch(max(step, 1))
        return stretch.sequences_before + (step + 1 - stretch.first_step) * stretch.size

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` steps together, media tokens and padding included."""
        return self.sequences_after(step) * self.seq_len

    def steps_for(self, tokens: int) -> int:
        """The fewest steps that have so many tokens together."""
        sequences = -(-tokens // self.seq_len)
        for stretch in reversed(self.stretches):
            if sequences > stretch.sequences_before:
                return stretch.first_step - 1 - (stretch.sequences_before - sequences) // stretch.size
        return 0

    def _stretch(self, step: int) -> _Stretch:
        return self.stretches[bisect_right(self.stretches, step, key=lambda each: each.first_step) - 1]


@lru_cache(maxsize=64)
def batch_schedule(
    size: int, seq_len: int, start: int | None, increment: int, length: SpanText
) -> BatchSchedule:
    """The schedule that ends with batches of `size` sequences; the other arguments are those of the ramp.

    A step has the size of the part of the ramp in which it begins.
    """
    if start is None:
        return BatchSchedule((_Stretch(1, size, 0),), seq_len)
    span, num_parts = Span.of(length), (size - start) // increment
    stretches = list[_Stretch]()
    first_step, sequences = 1, 0
    for part in range(num_parts):
        of_part = start + part * increment
        # The part ends at this position, compared without rounding.
        end = (part + 1) * span.number
        unit = of_part * seq_len if span.is_tokens else 1
        position = sequences * seq_len if span.is_tokens else first_step - 1
        steps = max(0, -(-(end - position * num_parts) // (unit * num_parts)))
        if steps:
            stretches.append(_Stretch(first_step, of_part, sequences))
        first_step, sequences = first_step + steps, sequences + steps * of_part
    stretches.append(_Stretch(first_step, size, sequences))
    return BatchSchedule(tuple(stretches), seq_len)
