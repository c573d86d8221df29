"""Everything that reports show of one configuration: its step, its memory, what both assume."""

from dataclasses import dataclass

from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.verdict import MemoryVerdict
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan of one configuration."""

    step: StepPlan
    """How long a step takes."""
    verdict: MemoryVerdict
    """Whether it fits."""
    memories: tuple[StageMemory, ...]
    """[stage] -> what its ranks hold."""

    @property
    def pipeline(self) -> PipelinePlan:
        """What was planned."""
        return self.step.pipeline

    @property
    def fullest(self) -> StageMemory:
        """The stage with the fullest devices."""
        return self.memories[self.verdict.stage]
