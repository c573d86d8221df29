"""Everything that reports show of one configuration: its step, its memory, what both assume."""

from dataclasses import dataclass

from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.verdict import MemoryVerdict, judge_memory
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan of one configuration."""

    step: StepPlan
    """How long a step takes."""
    verdict: MemoryVerdict
    """Whether it fits."""

    @property
    def memories(self) -> tuple[StageMemory, ...]:
        """[stage] -> what its ranks hold."""
        return self.verdict.memories

    @property
    def pipeline(self) -> PipelinePlan:
        """What was planned."""
        return self.step.pipeline

    @property
    def fullest(self) -> StageMemory:
        """The stage with the fullest devices."""
        return self.memories[self.verdict.stage]


def planned_of(pipeline: PipelinePlan) -> Planned:
    """Time and memory of a pipeline, with what would make it fit if it does not."""
    return Planned(step=plan_step(pipeline), verdict=judge_memory(pipeline, cost=gpu_s_of_step))


def gpu_s_of_step(pipeline: PipelinePlan) -> float:
    """What a step costs: its planned seconds on all ranks."""
    return plan_step(pipeline).step_s * pipeline.config.world_size
