"""One candidate, planned: whether it is legal, fits, and how long its step takes; torch-free."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.assumptions import Assumptions, as_configured
from k25_train.plan.cause import Cause
from k25_train.plan.memory.stage import fullest
from k25_train.plan.memory.verdict import Fit, MemoryVerdict
from k25_train.plan.offer import Offer
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.search.candidates import candidate_of, config_of
from k25_train.plan.search.space import Candidate, Choice
from k25_train.plan.time.step_plan import StepPlan
from parallel.config import DepMode, DepSchedule

PlanStep = Callable[[PipelinePlan], StepPlan]
JudgeMemory = Callable[[PipelinePlan], MemoryVerdict]


class Outcome(Enum):
    """What became of a candidate, the best first."""

    fits = "fits"
    """It fits with a margin."""
    tight = "tight"
    """It fits, with little."""
    too_large = "does not fit"
    """Device or host has too little memory."""
    illegal = "not legal"
    """A check of training refuses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What planning a candidate gave: a few numbers, which go from process to process."""

    candidate: Candidate
    """What was planned."""
    outcome: Outcome
    """What became of it."""
    device_bytes: float = 0.0
    """What the fullest device holds."""
    margin_bytes: float | None = None
    """What it leaves; None if the device is the CPU, or if nothing was counted."""
    stage: int = 0
    """Stage of that device."""
    step_s: float = float("inf")
    """Seconds of a step; infinite if it does not fit."""
    tokens_per_s_per_gpu: float = 0.0
    """Tokens that each rank trains in a second."""
    mfu: float = 0.0
    """Model FLOPs over the data sheet's."""
    parts: tuple[tuple[Cause, float], ...] = ()
    """Seconds of the step by cause."""
    note: str = ""
    """Why it is not legal, or what fills the device that is too small."""

    def seconds_of(self, *causes: Cause) -> float:
        """Seconds of the step that go to some causes."""
        return sum(seconds for cause, seconds in self.parts if cause in causes)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans candidates of one configuration. Everything in it can be sent to another process."""

    config: Config
    """The configuration that a search starts from."""
    assumptions: Assumptions
    """What plans assume."""
    offer: Offer
    """Choices and rules."""
    plan_step: PlanStep
    """The time of a step."""
    judge_memory: JudgeMemory
    """Whether it fits."""

    @cached_property
    def least_choice(self) -> Choice:
        """The choice with the fewest kernels: everything is kept, where it is."""
        names = list(self.offer.activations)
        kept = [name for name in names if self.offer.activations[name].keeps_all]
        return Choice((kept or names)[0], OptimizerOffload.none, DepMode.decoupled, DepSchedule.bubbles)

    def pipeline_of(self, candidate: Candidate) -> PipelinePlan:
        """The pipeline of a legal candidate."""
        config = config_of(self.config, candidate, self.offer)
        return plan_pipeline(config, assumptions=self.assumptions)

    def plan(self, candidate: Candidate, *, times_tight: bool = True) -> Trial:
        """Plan a candidate: rules first, then memory, then time, of what is tight only if that is wanted."""
        problems = self.offer.find_problems(config_of(self.config, candidate, self.offer))
        if problems:
            first = problems[0]
            note = f"{first.key} {first.rule}"
            return Trial(candidate=candidate, outcome=Outcome.illegal, note=note)
        return self._planned(candidate, self.pipeline_of(candidate), times_tight)

    def plan_configured(self, pipeline: PipelinePlan) -> Trial:
        """Plan what is configured, with its own layout of layers."""
        return self._planned(candidate_of(pipeline.config, self.offer), pipeline, True)

    def _planned(self, candidate: Candidate, pipeline: PipelinePlan, times_tight: bool) -> Trial:
        # 1. Memory.
        verdict = self.judge_memory(pipeline)
        outcome = {Fit.fits: Outcome.fits, Fit.tight: Outcome.tight}.get(verdict.fit, Outcome.too_large)
        trial = Trial(
            candidate=candidate,
            outcome=outcome,
            device_bytes=verdict.device_bytes,
            margin_bytes=verdict.margin_bytes,
            stage=verdict.stage,
        )
        if outcome is Outcome.too_large:
            return replace(trial, note=what_fills(verdict))
        is_as_configured = pipeline.assumptions == as_configured(pipeline.config)
        if (
            self.offer.problems_of_plan(pipeline, verdict.memories)
            if is_as_configured and verdict.memories
            else self.offer.find_plan_problems(pipeline.config)
        ):
            return replace(trial, outcome=Outcome.too_large, note="host memory")
        if outcome is Outcome.tight and not times_tight:
            return trial
        # 2. Time.
        step = self.plan_step(pipeline)
        return replace(
            trial,
            step_s=step.step_s,
            tokens_per_s_per_gpu=step.tokens_per_s_per_gpu,
            mfu=step.mfu,
            parts=tuple((part.cause, part.seconds) for part in step.parts),
        )


def what_fills(verdict: MemoryVerdict) -> str:
    """What takes the most of the fullest device, or that it is the host that is full."""
    if verdict.margin_bytes is None or verdict.margin_bytes >= 0:
        return "host memory"
    memory = fullest(verdict.memories)
    largest = max(memory.phases, key=memory.phases.__getitem__)
    return "states" if memory.states > memory.phases[largest] else f"what the {largest} holds"
