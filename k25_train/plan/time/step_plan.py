"""How long a step takes, and where its time goes: the result of the planner; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import PipelinePlan
from parallel.pipeline.timeline import Timeline

DAY_S = 86400.0
HOUR_S = 3600.0
RUN_TOKENS = 15e12
"""Tokens of a run for which days and GPU-hours are told. Source: the K2.5 report, section 4.4."""


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of a step that go to one cause while nothing else progresses; parts add up to the step."""

    cause: Cause
    """What takes the time."""
    seconds: float
    """How much of it."""
    how: str
    """What it is computed from, in a few words."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The time of a step."""

    pipeline: PipelinePlan
    """What was planned."""
    parts: tuple[Part, ...]
    """Where the time goes; one for each cause that has any."""
    timeline: Timeline
    """When the passes of one replica run, from the start of the first; of as many micro-batches as
    were simulated, the others repeat them."""
    model_flops: float
    """Model FLOPs of the step over all ranks, counted as MFU counts them."""
    busy_s: Mapping[str, float]
    """Resource (compute, nvlink, network, to the host, from the host) -> seconds of the step in which it is
    in use on a rank of that stage."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        train = self.pipeline.config.train
        return train.global_batch_size * train.seq_len

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens that each rank trains in a second."""
        return self.tokens / self.step_s / self.pipeline.config.world_size

    @property
    def tflops(self) -> float:
        """Model FLOPs of a rank in a second, in units of 1e12."""
        return self.model_flops / self.step_s / self.pipeline.config.world_size / 1e12

    @property
    def mfu(self) -> float:
        """The same over the data sheet's bfloat16 rate, whatever the products are computed in."""
        return self.tflops / self.pipeline.config.cluster.rates.bf16_tflops

    @property
    def exposed_s(self) -> dict[Cause, float]:
        """Communication that no computation hides, by kind."""
        return {part.cause: part.seconds for part in self.parts if part.cause.is_communication}

    @property
    def bubble_share(self) -> float:
        """Share of the step in which the pipeline is idle."""
        return sum(part.seconds for part in self.parts if part.cause is Cause.bubble) / self.step_s

    def days(self, tokens: float = RUN_TOKENS) -> float:
        """Days that so many tokens take."""
        return tokens / self.tokens * self.step_s / DAY_S

    def gpu_hours(self, tokens: float = RUN_TOKENS) -> float:
        """GPU-hours that so many tokens take."""
        return tokens / self.tokens * self.step_s / HOUR_S * self.pipeline.config.world_size
