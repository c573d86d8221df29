"""What plans say of the durations that a run has measured, with given constants; torch-free."""

from dataclasses import dataclass, replace

from k25_train.config.rates import CalibrationConfig
from k25_train.config.schema import Config
from k25_train.plan.assumptions import AS_CONFIGURED
from k25_train.plan.calibrate.measured import MeasuredRun
from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.step_durations import StepDurations

LEFT_OUT = (Cause.data, Cause.checkpoint)
"""What plans count in a step and runs do not: what they waited for data is told apart, and they save between
steps."""
PASS_NOISE = 0.02
"""Error of a traced pass, as a share of the mean one: its rank is profiled. Our choice."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A duration of a run."""

    run: str
    """Its folder."""
    what: str
    """In a few words."""
    is_step: bool
    """Whether it is of whole steps, and not of passes in one."""
    seconds: float
    noise: float
    """Its relative standard error."""


def measurements(run: MeasuredRun) -> list[Measurement]:
    """What a run has measured, in the order of `planned_s`."""
    found = []
    for group in run.groups:
        what = f"step of {group.vision_share:.0%} images" if len(run.groups) > 1 else "step"
        found.append(Measurement(run.name, what, True, group.step_s, group.noise))
    # A chunk without layers takes almost nothing, of which no plan knows the half.
    noise_s = PASS_NOISE * sum(each.seconds for each in run.passes) / max(len(run.passes), 1)
    for each in run.passes:
        what = f"{'forward' if each.is_forward else 'backward'} of chunk {each.chunk}"
        found.append(Measurement(run.name, what, False, each.seconds, noise_s / each.seconds))
    return found


def with_calibration(config: Config, constants: CalibrationConfig) -> Config:
    """The same configuration with these constants."""
    rates = replace(config.cluster.rates, calibration=constants)
    return replace(config, cluster=replace(config.cluster, rates=rates))


def planned_s(run: MeasuredRun, constants: CalibrationConfig) -> list[float]:
    """Seconds that plans say for each of `measurements(run)`."""
    config = with_calibration(run.config, constants)
    steps = [planned_step_s(_pipeline(config, group.vision_share)) for group in run.groups]
    if not run.passes:
        return steps
    seconds = StepDurations(_pipeline(config, run.trace_vision_share))
    return steps + [seconds.alone_s(each.chunk, is_forward=each.is_forward) for each in run.passes]


def planned_step_s(pipeline: PipelinePlan) -> float:
    """Seconds of a step, as runs measure it."""
    return sum(part.seconds for part in plan_step(pipeline).parts if part.cause not in LEFT_OUT)


def _pipeline(config: Config, vision_share: float) -> PipelinePlan:
    return plan_pipeline(config, assumptions=replace(AS_CONFIGURED, vision_share=vision_share))
