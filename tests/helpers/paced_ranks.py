"""Slow motion: ranks that share a few cores behave as if each had a device of its own.

A rank that waits on a shared core gives it to another one, so work done while waiting saves no time there. In
slow motion everything runs as it does (code, processes, messages), but each pass of a chunk and each stretch
of the vision tower lasts as long as its model FLOPs take at given rates: when its computation is
done, the rank sleeps until then, which needs no core. Rates have to be so low that computing is a small part
of it; `Clock.computing_share` says how small it was.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from k25_train.config.rates import CalibrationConfig
from k25_train.config.schema import Config
from k25_train.plan.flops import encoder_cost
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.step import chunk_seconds, decoupled_cost, encoder_flops_per_s
from parallel.dep.grid import Grid


class Clock:
    """How long the parts of this rank's steps are to last, and what it did."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` lets so many seconds pass."""
        self._sleep = sleep
        self.is_slow = False
        """Whether parts are stretched."""
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.text_s = 0.0
        """Seconds that the passes of chunks were to last, the coupled tower left out."""
        self.vision_s = 0.0
        """Seconds that the tower was to last."""
        self.computing_s = 0.0
        """Seconds that both took before the sleep."""

    @property
    def computing_share(self) -> float:
        """Of the time of passes and tower."""
        return self.computing_s / max(self.text_s + self.vision_s, 1e-9)

    @contextmanager
    def lasting(self, text_s: float, vision_s: float) -> Iterator[None]:
        """Around what is to last so long."""
        started_s = time.perf_counter()
        yield
        self.end(started_s, text_s, vision_s)

    def end(self, started_s: float, text_s: float, vision_s: float) -> None:
        """Sleep until so long after `started_s`, a `time.perf_counter`."""
        self.computing_s += time.perf_counter() - started_s
        self.text_s += text_s
        self.vision_s += vision_s
        if self.is_slow:
            self._sleep(max(0.0, started_s + text_s + vision_s - time.perf_counter()))


@contextmanager
def leaping_clock() -> Iterator[Callable[[float], None]]:
    """Within: a `sleep` that takes no time, and is in `time.perf_counter` all the same. For a single rank:
    others would not wait for it."""
    real, slept = time.perf_counter, [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += seconds

    with patch.object(time, "perf_counter", lambda: real() + slept[0]):
        yield sleep


def at_pace(config: Config, tflops: float) -> Config:
    """A configuration whose device computes float32 at that rate, and nothing else takes time."""
    neutral = CalibrationConfig(kernels=1.0, exchange=0.0, pass_ms=0.0, step_ms=0.0)
    rates = replace(config.cluster.rates, float32_tflops=tflops, calibration=neutral)
    return replace(config, cluster=replace(config.cluster, rates=rates))


def slow_down(run: Any, clock: Clock, pace: Config) -> None:
    """Make passes and tower of a `Run` last what its configuration with the rates of `pace` says, as far as
    `clock` is told to.

    A pass is taken to cost what it does over sequences of a single document, as in the plan of the idle
    times, so that steps with and without images differ by the tower alone.
    """
    place, config = run.topology, pace
    seconds = chunk_seconds(plan_pipeline(config)).forward_s
    for vp_stage, chunk in enumerate(run.chunks):
        forward_s = seconds[vp_stage * place.pp_size + place.pp_rank]
        has_tower = chunk.module.vision_tower is not None
        chunk.module.forward = _slow_chunk(chunk.module.forward, forward_s, has_tower, config, clock)
    if run.tower.replicas:
        _slow_tower(config, clock)


def _slow_chunk(
    forward: Callable[..., Tensor], forward_s: float, has_tower: bool, config: Config, clock: Clock
) -> Callable[..., Tensor]:
    """Forward of a chunk, a coupled tower included, which makes its backward slow as well."""
    cost, rate = encoder_cost(config.model.vision, config.model.hidden_size), encoder_flops_per_s(config)

    def call(*args: Any, grid_thw: Sequence[Grid], **kwargs: Any) -> Tensor:
        tower_s = sum(map(cost.of_item, grid_thw)) / rate if has_tower else 0.0
        with clock.lasting(forward_s, tower_s):
            output = forward(*args, grid_thw=grid_thw, **kwargs)

        def begin_backward(_: Tensor) -> None:
            started_s = time.perf_counter()
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: clock.end(started_s, 2 * forward_s, 2 * tower_s)
            )

        if output.requires_grad:
            output.register_hook(begin_backward)
        return output

    return call


def _slow_tower(config: Config, clock: Clock) -> None:
    """The decoupled tower, as both engines call it."""
    from parallel.dep import bubble_engine, upfront_engine
    from parallel.dep.vision_pass import BackwardInSteps, Chunk, EncodeInSteps

    cost, rate = decoupled_cost(config), encoder_flops_per_s(config)

    def forward_s(chunk: Chunk) -> float:
        return sum(map(cost.of_item, chunk.grid_thw)) / rate

    def slow[Result](function: Callable[..., Result], num_forward: int) -> Callable[..., Result]:
        def call(encoder: Any, chunk: Chunk, last: Any) -> Result:
            with clock.lasting(0.0, num_forward * forward_s(chunk)):
                return function(encoder, chunk, last)

        return call

    def slow_steps[Pass: EncodeInSteps | BackwardInSteps](kind: type[Pass], num_forward: int) -> type[Pass]:
        class Slow(kind):  # type: ignore[valid-type,misc]
            def __init__(self, encoder: Any, chunk: Chunk, last: Any, **more: bool) -> None:
                super().__init__(encoder, chunk, last, **more)
                self._step_s = num_forward * forward_s(chunk) / config.model.vision.num_layers

            def advance(self, num_steps: int) -> Any:
                with clock.lasting(0.0, num_steps * self._step_s):
                    return super().advance(num_steps)

        return Slow

    # Recomputation and backward are three forward passes.
    upfront_engine.encode = slow(upfront_engine.encode, 1)
    upfront_engine.recompute_and_backward = slow(upfront_engine.recompute_and_backward, 3)
    bubble_engine.EncodeInSteps = slow_steps(EncodeInSteps, 1)  # type: ignore[misc]
    bubble_engine.BackwardInSteps = slow_steps(BackwardInSteps, 3)  # type: ignore[misc]
