"""Every group of a run: those of its step files, and those that are in progress in its journal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.data.trajectories.reading import StepFile
from k25_train.errors import RolloutError
from k25_train.rollout.journal import read_state
from k25_train.rollout.trajectory import Response

ROLLOUTS, JOURNAL = "rollouts", "journal"
"""Folders of a run: of step files, and of the journal in it."""
UNDER_WAY = 0
"""In the place of a step, for a group that no step has."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShownBranch:
    """A path of tokens of a response."""

    token_ids: np.ndarray
    """[n] int32."""
    generated: np.ndarray
    """[n] bool: whether the policy drew it, and no other branch has it."""
    logprobs: np.ndarray
    """[n] float32."""
    versions: np.ndarray
    """[n] int32."""
    num_opening: int
    """Tokens in front of the first that the policy drew and no earlier branch has."""
    num_shared: int
    """Tokens that an earlier branch has as well."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShownResponse:
    """One response, as far as it is."""

    branches: tuple[ShownBranch, ...]
    """Paths of tokens, in the order in which they began."""
    facts: Mapping[str, Any]
    """Verdict and why it ended, as a step file has them; `reward` is None where there is none."""

    @property
    def num_drawn(self) -> int:
        """Tokens that the policy drew, in all branches together."""
        return len(self.logprobs)

    @property
    def logprobs(self) -> np.ndarray:
        """[n] float32: of what was drawn."""
        parts = [branch.logprobs[branch.generated] for branch in self.branches]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    @property
    def versions(self) -> np.ndarray:
        """[n] int32: of what was drawn."""
        parts = [branch.versions[branch.generated] for branch in self.branches]
        return np.concatenate([np.zeros(0, np.int32), *parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownGroup:
    """One group."""

    number: int
    """Place in the order of tasks."""
    task: str
    """Key of its task."""
    step: int
    """That trains on it; `UNDER_WAY` for none yet."""
    responses: tuple[ShownResponse, ...]
    """What there is of each."""

    @property
    def rewards(self) -> list[float]:
        """Of the responses that have one."""
        found = [response.facts["reward"] for response in self.responses]
        return [float(reward) for reward in found if reward is not None]

    @property
    def num_tokens(self) -> list[int]:
        """Of each response."""
        return [response.num_drawn for response in self.responses]


def groups_of_run(run: Path) -> Iterator[ShownGroup]:
    """Groups by step, then those in progress. Raises `RolloutError` for a folder without rollouts, and
    `DataError` for damaged step files."""
    folder = run / ROLLOUTS
    named = ((path.stem.removeprefix("step_"), path) for path in folder.glob("step_*.safetensors"))
    files = {int(step): path for step, path in named if step.isdigit()}
    if not files and not (folder / JOURNAL).is_dir():
        raise RolloutError(f"{run}: has no rollouts: name the run.dir of `python -m k25_train.rl`")
    for step in sorted(files):
        yield from _of_step(step, StepFile(files[step]))
    state = read_state(folder / JOURNAL, has_data=lambda step: step in files)
    for number in sorted(state.open):
        group = state.open[number]
        responses = tuple(of_journal(response) for response in group.responses)
        yield ShownGroup(number=number, task=group.task, step=UNDER_WAY, responses=responses)


def _of_step(step: int, file: StepFile) -> Iterator[ShownGroup]:
    found: dict[int, list[int]] = {}
    for number, facts in enumerate(file.facts):
        found.setdefault(facts["group"], []).append(number)
    for group, numbers in found.items():
        samples: dict[int, list[int]] = {}
        for number in numbers:
            samples.setdefault(file.facts[number]["sample"], []).append(number)
        responses = tuple(_of_file(file, each) for each in samples.values())
        yield ShownGroup(number=group, task=file.facts[numbers[0]]["task"], step=step, responses=responses)


def _of_file(file: StepFile, numbers: Sequence[int]) -> ShownResponse:
    """A response of these trajectories."""
    branches = []
    for number in numbers:
        rows, facts = file.rows(number), file.facts[number]
        branches.append(
            ShownBranch(
                token_ids=rows.tokens,
                generated=rows.generated,
                logprobs=rows.rollout_logprobs,
                versions=rows.versions,
                num_opening=int(np.argmax(rows.generated)),
                # Files from before there were branches have none but the first.
                num_shared=facts.get("shared", 0),
            )
        )
    return ShownResponse(branches=tuple(branches), facts=file.facts[numbers[0]])


def of_journal(response: Response) -> ShownResponse:
    """A response as the journal has it."""
    verdict = response.verdict.as_json() if response.verdict else {"reward": None, "parts": {}, "reason": ""}
    reason = str(response.ended) if response.ended else None
    facts = {"finish_reason": reason, "attempt": response.attempt, "turns": response.num_turns, **verdict}
    branches = tuple(
        ShownBranch(
            token_ids=branch.token_ids,
            generated=branch.own,
            logprobs=branch.logprobs,
            versions=branch.versions,
            num_opening=branch.prompt_tokens,
            num_shared=branch.num_shared,
        )
        for branch in response.branches
    )
    return ShownResponse(branches=branches, facts=facts)
