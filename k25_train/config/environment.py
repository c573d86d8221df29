"""Which tasks a policy is trained on. Values are our choice."""

from dataclasses import dataclass

from k25_train.config.basics import not_negative
from k25_train.config.sandbox import SandboxConfig
from parallel.config import Problem, not_positive


@dataclass(slots=True, kw_only=True)
class TaskSourceConfig:
    """One source of tasks; its name is free."""

    family: str
    """Kind of task (`k25_train/environments`)."""
    weight: float = 1.0
    """Share of the groups, relative to the other sources'."""
    num_tasks: int = 1_000
    """Tasks of an epoch."""
    num_heldout: int = 200
    """Tasks that are never trained on."""
    options: dict[str, str] | None = None
    """What the family lets one choose, as texts; null for its own choice."""
    rubrics: dict[str, float] | None = None
    """Set of rubrics -> share of a verified reward that its full score adds (`k25_train/rl/rewards`); null
    for none. The model of `rollout.judge_url` scores them."""
    diversify: bool = False
    """Whether prompts, names of tools and formats vary from task to task (`environments/diversify`)."""
    instructions: int = 0
    """Most verifiable instructions that are added to a prompt, and checked (`environments/instructions`)."""
    agent: list[str] | None = None
    """Command of an agent that acts instead of our loop, through the gateway; null for our loop."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("num_tasks",)) + not_negative(
            self, ("weight", "num_heldout", "instructions")
        )
        if not self.family.strip():
            found.append(Problem("family", self.family, "must name a family of tasks", "e.g. family: sums"))
        if self.agent is not None and not self.agent:
            found.append(Problem("agent", [], "must be a command", "e.g. [mini], or null for our loop"))
        found += [
            Problem("rubrics", {name: bonus}, "must be positive", "e.g. 0.2, or leave the set out")
            for name, bonus in (self.rubrics or {}).items()
            if not bonus > 0
        ]
        return found


@dataclass(slots=True, kw_only=True)
class EnvironmentConfig:
    """Where tasks come from."""

    tasks: dict[str, TaskSourceConfig]
    """Name -> source of tasks."""
    epochs: int
    """How many times every task is trained on at most; the run ends before a task would be used again."""
    sandbox: SandboxConfig
    """In what agents and tests run, and what one sandbox may take."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("epochs",))
        found += [problem.under("sandbox") for problem in self.sandbox.problems()]
        for name, source in self.tasks.items():
            found += [problem.under(f"tasks.{name}") for problem in source.problems()]
        if not any(source.weight for source in self.tasks.values()):
            rule = "must have a source with a weight above 0"
            found.append(Problem("tasks", sorted(self.tasks), rule, "give one a weight"))
        return found
