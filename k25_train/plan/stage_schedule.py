"""What changes over a chain of stages, by their tokens: rate, batch, vision ratio, length. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from k25_train.config.data import DataConfig
from k25_train.config.optimizer import OptimConfig
from k25_train.config.parts import ModelPart
from k25_train.config.schema import Config
from k25_train.config.span import Span, SpanText
from k25_train.config.training import TrainConfig
from k25_train.plan.schedule import Schedule

NUM_POINTS = 120
"""Steps of a stage that are looked at, evenly, in addition to those at which something changes."""
_OF_WARM_UP = 12
"""Steps within the warm-up that are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A step of a stage."""

    step: int
    """Counted from 1 in its stage."""
    tokens: int
    """Of the chain up to the end of the step."""
    rates: Mapping[ModelPart, float]
    """Part of the model that is trained -> learning rate of its update."""
    batch_tokens: int
    """Tokens of the step."""
    vision_ratio: float
    """Share of tokens in sequences with media: `data.vision_ratio`, or by the weights of sources that may
    have media as far as the configuration tells."""
    moves_expert_bias: bool
    """Whether router biases follow the load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCurve:
    """One stage of a chain."""

    name: str
    """Of the stage."""
    config: Config
    """Its configuration."""
    start: int
    """Tokens of all stages before."""
    points: tuple[Point, ...]
    """In the order of steps; the first and the last step among them."""

    @property
    def tokens(self) -> int:
        """Tokens of the stage."""
        return self.points[-1].tokens - self.start

    @property
    def end(self) -> int:
        """Tokens of the chain up to its end."""
        return self.points[-1].tokens


def chain_curves(stages: Sequence[tuple[str, Config]]) -> tuple[StageCurve, ...]:
    """The curves of stages that follow one another.

    Args:
        stages: name and configuration of each, in order.
    """
    curves, start = list[StageCurve](), 0
    for name, config in stages:
        points = tuple(_point(config, step, start) for step in _steps_of(config))
        curves.append(StageCurve(name=name, config=config, start=start, points=points))
        start = curves[-1].end
    return tuple(curves)


def _point(config: Config, step: int, start: int) -> Point:
    optim, batches, schedule = config.optim, config.train.batches, Schedule(config.optim, config.train)
    rate = schedule.learning_rate(step)
    parts = (part for part in ModelPart if part in optim.trained)
    return Point(
        step=step,
        tokens=start + batches.tokens_after(step),
        rates={part: rate * optim.of(part).lr_scale for part in parts},
        batch_tokens=batches.size_of(step) * batches.seq_len,
        vision_ratio=_vision_ratio(config.data, step),
        moves_expert_bias=schedule.moves_expert_bias(step),
    )


def _vision_ratio(data: DataConfig, step: int) -> float:
    """The share that holds at a step; a change of the mixture leaves what it does not name as it was."""
    ratio, weights = data.vision_ratio, {name: source.weight for name, source in data.sources.items()}
    for change in sorted(data.schedule.values(), key=lambda change: change.from_step):
        if change.from_step <= step:
            weights |= change.weights
            ratio = ratio if change.vision_ratio is None else change.vision_ratio
    if ratio is not None:
        return ratio
    media = sum(weights[name] for name in data.with_media)
    return media / sum(weights.values())


def _steps_of(config: Config) -> list[int]:
    """Steps to look at: evenly spaced ones, and both sides of every change."""
    last = config.train.steps
    even = {1 + (last - 1) * number // NUM_POINTS for number in range(NUM_POINTS + 1)}
    changes = {side for step in _changes(config.optim, config.train) for side in (step - 1, step)}
    mixed = {each.from_step for each in config.data.schedule.values()}
    changes |= {side for step in mixed for side in (step - 1, step)}
    return sorted(step for step in even | changes | {1, last} if 1 <= step <= last)


def _changes(optim: OptimConfig, train: TrainConfig) -> Iterator[int]:
    """Steps in the warm-up, and those at which rate, batch or biases begin to change or end to."""
    batches = train.batches
    warm = _steps_in(optim.warmup, train)
    yield from (warm * number // _OF_WARM_UP for number in range(1, _OF_WARM_UP + 1))
    yield warm + 1
    yield from (stretch.first_step for stretch in batches.stretches)
    for span in (optim.decay, optim.frozen_expert_bias):
        yield _first_of_last(span, train)


def _steps_in(text: SpanText, train: TrainConfig) -> int:
    span = Span.of(text)
    return train.batches.steps_for(span.number) if span.is_tokens else span.number


def _first_of_last(text: SpanText, train: TrainConfig) -> int:
    """The first step of the last part of the run of this length."""
    span, batches = Span.of(text), train.batches
    if not span.is_tokens:
        return train.steps - span.number + 1
    return batches.steps_for(max(0, batches.tokens_after(train.steps) - span.number)) + 1
