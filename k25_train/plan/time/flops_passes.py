"""Passes that take their model FLOPs at one rate, and exchanges that nothing hides; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.step import chunk_seconds
from k25_train.plan.time.step_plan import Cause
from parallel.pipeline.timeline import ChunkSeconds


@dataclass(frozen=True)
class PassTime:
    """How long a pass takes, and where the time goes."""

    seconds: float
    parts: Mapping[Cause, float]
    busy_s: Mapping[str, float]


@dataclass(frozen=True)
class FlopsPasses:
    """Passes that compute."""

    seconds: ChunkSeconds

    def alone(self, chunk: int, is_forward: bool) -> PassTime:
        """A pass by itself."""
        return _computed(self.seconds.alone_s(chunk, is_forward=is_forward))

    def pair(self, forward_chunk: int, backward_chunk: int) -> PassTime:
        """Two passes."""
        return _computed(self.seconds.pair_s(forward_chunk, backward_chunk))


def _computed(seconds: float) -> PassTime:
    return PassTime(seconds, {Cause.compute: seconds}, {"compute": seconds})


def pass_times(pipeline: PipelinePlan) -> FlopsPasses:
    """The passes of a plan."""
    kernels = pipeline.config.cluster.rates.calibration.kernels
    found = chunk_seconds(pipeline)
    return FlopsPasses(
        ChunkSeconds(
            forward_s=tuple(kernels * each for each in found.forward_s),
            backward_s=tuple(kernels * each for each in found.backward_s),
        )
    )
