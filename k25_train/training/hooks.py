"""What else happens around the steps of a run: nothing in pre-training and fine-tuning, rollouts in
reinforcement learning (`k25_train/rl`).

Every rank calls every method, at the same steps.
"""

from typing import Protocol

from k25_train.run_folder.rows_file import Value
from k25_train.training.step import StepResult


class StepHooks(Protocol):
    """Called by the trainer around its steps."""

    def resumed(self, step: int) -> None:
        """The run goes on behind `step`, whose weights are loaded; 0 for a new run."""

    def before(self, step: int) -> None:
        """`step` is about to be trained: its data have to be there when this returns."""

    def after(self, step: int, result: StepResult) -> dict[str, Value]:
        """`step` was trained; returns what its row says in addition."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of an evaluation after `step`, in addition to held-out losses."""

    def close(self) -> None:
        """The run ends, in good order or not."""


class NoHooks:
    """Nothing else happens."""

    def resumed(self, step: int) -> None:
        """See `StepHooks`."""

    def before(self, step: int) -> None:
        """See `StepHooks`."""

    def after(self, step: int, result: StepResult) -> dict[str, Value]:
        """See `StepHooks`."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """See `StepHooks`."""
        return {}

    def close(self) -> None:
        """See `StepHooks`."""


NO_HOOKS = NoHooks()
"""Nothing has state."""
