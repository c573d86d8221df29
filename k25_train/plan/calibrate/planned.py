"""What plans say of the durations that a run has measured, with given constants; torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from k25_train.config.rates import CalibrationConfig
from k25_train.config.schema import Config
from k25_train.plan.assumptions import AS_CONFIGURED
from k25_train.plan.calibrate.measured import MeasuredRun
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.step import chunk_seconds
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds

PASS_NOISE = 0.02
"""Relative error of a traced pass: its rank is profiled. Our choice."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A duration of a run."""

    run: str
    """Its folder."""
    what: str
    """In a few words."""
    seconds: float
    noise: float
    """Its relative standard error."""


def measurements(run: MeasuredRun) -> list[Measurement]:
    """What a run has measured, in the order of `planned_s`.

    The passes together weigh about as much as a duration whose error is theirs.
    """
    many = len(run.groups) > 1
    found = [
        Measurement(
            run.name,
            f"step of {group.vision_share:.0%} images" if many else "step",
            group.step_s,
            group.noise,
        )
        for group in run.groups
    ]
    noise = PASS_NOISE * len(run.passes) ** 0.5
    return found + [
        Measurement(
            run.name,
            f"{'forward' if each.is_forward else 'backward'} of chunk {each.chunk}",
            each.seconds,
            noise,
        )
        for each in run.passes
    ]


def with_calibration(config: Config, constants: CalibrationConfig) -> Config:
    """The same configuration with these constants."""
    rates = replace(config.cluster.rates, calibration=constants)
    return replace(config, cluster=replace(config.cluster, rates=rates))


def planned_s(run: MeasuredRun, constants: CalibrationConfig) -> list[float]:
    """Seconds that plans say for each of `measurements(run)`."""
    config = with_calibration(run.config, constants)
    steps = [planned_step_s(config, group.vision_share) for group in run.groups]
    if not run.passes:
        return steps
    seconds = _chunk_seconds(config)
    of_direction = {True: seconds.forward_s, False: seconds.backward_s}
    return steps + [of_direction[each.is_forward][each.chunk] for each in run.passes]


def planned_step_s(config: Config, vision_share: float) -> float:
    """Seconds of a step's computation, communication and optimizer."""
    assumptions = replace(AS_CONFIGURED, vision_share=vision_share)
    pipeline = plan_pipeline(config, assumptions=assumptions)
    text = simulate([stage.passes for stage in pipeline.stages], _chunk_seconds(config))
    return text.makespan_s + config.cluster.rates.calibration.step_ms / 1000


def _chunk_seconds(config: Config) -> ChunkSeconds:
    constants = config.cluster.rates.calibration
    seconds = chunk_seconds(plan_pipeline(config))

    def with_constants(each: Sequence[float]) -> tuple[float, ...]:
        return tuple(constants.kernels * one + constants.pass_ms / 1000 for one in each)

    return ChunkSeconds(
        forward_s=with_constants(seconds.forward_s), backward_s=with_constants(seconds.backward_s)
    )
