"""Every group of a run: those of its step files, and those that are in progress in its journal."""

from collections.abc import Iterator, Mapping
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
class ShownResponse:
    """One response, as far as it is."""

    prompt_ids: np.ndarray
    """[P] int32."""
    token_ids: np.ndarray
    """[n] int32."""
    logprobs: np.ndarray
    """[n] float32."""
    versions: np.ndarray
    """[n] int32."""
    facts: Mapping[str, Any]
    """Verdict and why it ended, as a step file has them; `reward` is None where there is none."""


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
        return [len(response.token_ids) for response in self.responses]


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
        responses = tuple(_of_journal(response) for response in group.responses)
        yield ShownGroup(number=number, task=group.task, step=UNDER_WAY, responses=responses)


def _of_step(step: int, file: StepFile) -> Iterator[ShownGroup]:
    found: dict[int, list[int]] = {}
    for number, facts in enumerate(file.facts):
        found.setdefault(facts["group"], []).append(number)
    for group, numbers in found.items():
        responses = tuple(_of_file(file, number) for number in numbers)
        yield ShownGroup(number=group, task=file.facts[numbers[0]]["task"], step=step, responses=responses)


def _of_file(file: StepFile, number: int) -> ShownResponse:
    rows = file.rows(number)
    return ShownResponse(
        prompt_ids=rows.tokens[~rows.generated],
        token_ids=rows.tokens[rows.generated],
        logprobs=rows.rollout_logprobs[rows.generated],
        versions=rows.versions[rows.generated],
        facts=file.facts[number],
    )


def _of_journal(response: Response) -> ShownResponse:
    verdict = response.verdict.as_json() if response.verdict else {"reward": None, "parts": {}, "reason": ""}
    reason = response.ended.value if response.ended else None
    return ShownResponse(
        prompt_ids=response.prompt_ids,
        token_ids=response.token_ids,
        logprobs=response.logprobs,
        versions=response.versions,
        facts={"finish_reason": reason, **verdict},
    )
