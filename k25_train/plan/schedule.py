"""What changes over a run by steps or tokens: the learning rate and whether router biases move. Pure.

The rate is the warm-up, stable, decay (WSD) schedule of K2 (report, section 2.5). Everything is a function of
the configuration and the step alone, so a resumed run goes on with the very values of one that was not
interrupted.
"""

import math
from dataclasses import dataclass

from k25_train.config.optimizer import OptimConfig
from k25_train.config.span import Span
from k25_train.config.training import TrainConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """The schedule of a run. Steps are counted from 1; tokens are those of whole batches."""

    optim: OptimConfig
    train: TrainConfig

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update of a step, before the factors of the model's parts.

        Rises linearly from `start_lr` to `lr` over `warmup`, stays there, and falls along half a cosine to
        `min_lr` over `decay`, the last part of the run. Each span counts in its own unit what is done after
        the step.
        """
        optim, warmup, decay = self.optim, Span.of(self.optim.warmup), Span.of(self.optim.decay)
        done = self._after(step, warmup)
        if done <= warmup.number:
            return optim.start_lr + (optim.lr - optim.start_lr) * done / warmup.number
        into_decay = self._after(step, decay) - self._start_of_last(decay)
        if into_decay <= 0:
            return optim.lr
        progress = into_decay / decay.number
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def moves_expert_bias(self, step: int) -> bool:
        """Whether the routers' expert biases follow the load of a step: not in the last part of the run, nor
        ever in a language model that is not trained."""
        frozen = Span.of(self.optim.frozen_expert_bias)
        is_last = self._after(step - 1, frozen) >= self._start_of_last(frozen)
        return self.optim.language_model.trained and not is_last

    @property
    def fits(self) -> bool:
        """Whether the run is long enough for warm-up and decay, one after the other."""
        warmup, decay = Span.of(self.optim.warmup), Span.of(self.optim.decay)
        batches, start = self.train.batches, self._start_of_last(decay)
        if warmup.is_tokens is decay.is_tokens:
            return warmup.number <= start
        # Of two units, tokens are the finer one.
        warm = warmup.number if warmup.is_tokens else batches.tokens_after(warmup.number)
        return start >= 0 and warm <= (start if decay.is_tokens else batches.tokens_after(start))

    @property
    def fits_frozen_bias(self) -> bool:
        """Whether the run is at least as long as its last part, in which biases stay."""
        return self._start_of_last(Span.of(self.optim.frozen_expert_bias)) >= 0

    def _after(self, step: int, span: Span) -> int:
        """What is done after a step, in the unit of the span."""
        return self.train.batches.tokens_after(step) if span.is_tokens else step

    def _start_of_last(self, span: Span) -> int:
        """Where the run's last part of that length begins, in its unit."""
        return self._after(self.train.steps, span) - span.number
