"""The step files of a run as the loop needs them: which there are, of which groups, and where a run is behind
them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k25_train.data.trajectories.reading import StepFile
from k25_train.data.trajectories.rows import Trajectories
from k25_train.data.trajectories.step_file import step_path, write_step_file
from k25_train.errors import RolloutError

GROUPS, TOGGLE, FIGURES = "groups", "toggle", "figures"
"""Keys of the state of a step: numbers of its groups, of `toggle.py`, and what its row says of them."""


class StepFiles:
    """Files of a run's steps. A phase writes those of all its steps, the first of them last: while that is
    missing, none of them counts."""

    def __init__(self, folder: Path, steps_per_rollout: int) -> None:
        self._folder = folder
        self._steps_per_rollout = steps_per_rollout

    def begin_of(self, step: int) -> int:
        """The first step of the phase that `step` is in."""
        return (step - 1) // self._steps_per_rollout * self._steps_per_rollout + 1

    def has(self, step: int) -> bool:
        """Whether a step has its file, and its phase all of them."""
        return all(step_path(self._folder, each).is_file() for each in {step, self.begin_of(step)})

    def write(self, step: int, rows: Trajectories, state: Mapping[str, Any]) -> None:
        """Write the file of a step. Raises `RolloutError` if it cannot be written."""
        path = step_path(self._folder, step)
        try:
            write_step_file(path, rows, state)
        except OSError as error:
            raise RolloutError(
                f"{path}: cannot be written ({error}): make room, and start again; the journal has what was "
                "rolled out"
            ) from error

    def state(self, step: int) -> Mapping[str, Any]:
        """Where the run is behind a step. Raises `DataError` if its file cannot be read."""
        return StepFile(step_path(self._folder, step)).state

    def following(self, step: int) -> list[int]:
        """Steps behind `step` that have their files, one after another."""
        found = []
        while self.has(step + 1):
            step += 1
            found.append(step)
        return found

    def all(self) -> list[int]:
        """Steps with a file, in order."""
        names = (path.stem.removeprefix("step_") for path in self._folder.glob("step_*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit())


def groups_of(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the groups that a step was made of."""
    return tuple(state[GROUPS])
