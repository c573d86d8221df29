"""Derives a run's state from its journal once more, and holds it against the step files.

records ─► state ─► (again) the same state: each record counts once
             └────► consumed(step) ─► groups of the step file: tokens, log-probabilities, versions, rewards
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25_train.errors import RolloutError
from k25_train.rollout.journal_state import JournalState
from k25_train.rollout.overview.groups import ShownGroup, ShownResponse, of_journal
from k25_train.rollout.records import Record
from k25_train.rollout.trajectory import Group


@dataclass(slots=True)
class Replayed:
    """What came of it."""

    records: int = 0
    """Records that were read."""
    steps: int = 0
    """Steps whose groups were compared."""
    responses: int = 0
    """Responses that were compared, token by token."""
    partial: int = 0
    """Groups whose first records are gone with files that nobody needs: not compared."""
    differences: list[str] = field(default_factory=list)
    """What does not agree."""


def replay(records: Iterable[Record], files: Mapping[int, Mapping[int, ShownGroup]]) -> Replayed:
    """Go through the records.

    Args:
        records: of the journal, in order.
        files: step -> number of a group -> what its step file has.
    """
    found, state = Replayed(), JournalState(lambda step: step in files)
    for record in records:
        found.records += 1
        header = record.header
        if header["kind"] == "consumed" and header["step"] in files:
            _compare_step(found, header["step"], header["groups"], state.open, files[header["step"]])
        before = (state.num_admitted, len(state.open))
        try:
            state.apply(record)
            after = (state.num_admitted, len(state.open))
            state.apply(record)
        except RolloutError as error:
            found.differences.append(f"record {found.records}: {error}")
            continue
        if (state.num_admitted, len(state.open)) != after:
            found.differences.append(f"record {found.records} ({header['kind']}): counts twice, {before}")
    for step in sorted(set(files) - set(state.consumed)):
        found.differences.append(f"step {step}: has a file, but no record says that it consumed its groups")
    return found


def _compare_step(
    found: Replayed,
    step: int,
    numbers: Iterable[int],
    groups: Mapping[int, Group],
    file: Mapping[int, ShownGroup],
) -> None:
    found.steps += 1
    if set(numbers) != set(file):
        found.differences.append(
            f"step {step}: groups {sorted(numbers)} in the journal, {sorted(file)} in its file"
        )
    for number in sorted(set(numbers) & set(file)):
        if number not in groups:
            found.partial += 1
            continue
        trained = {response.facts["sample"]: response for response in file[number].responses}
        for sample, response in enumerate(groups[number].responses):
            if sample in trained:
                found.responses += 1
                where = f"step {step}, group {number}, response {sample}"
                found.differences += [
                    f"{where}: {what}" for what in _differ(of_journal(response), trained[sample])
                ]


def _differ(journal: ShownResponse, file: ShownResponse) -> Iterator[str]:
    for name, of in (("token ids", _ids), ("log-probabilities", _logprobs), ("versions", _versions)):
        mine, theirs = of(journal), of(file)
        if len(mine) != len(theirs):
            yield f"{len(mine)} drawn {name} in the journal, {len(theirs)} in the step file"
        elif not np.array_equal(mine, theirs):
            yield f"{name} differ from number {int(np.flatnonzero(mine != theirs)[0])} on"
    for name in ("reward", "finish_reason"):
        ours: Any = journal.facts[name]
        if ours != file.facts[name]:
            yield f"{name} {ours!r} in the journal, {file.facts[name]!r} in the step file"


def _ids(response: ShownResponse) -> np.ndarray:
    parts = [branch.token_ids[branch.generated] for branch in response.branches]
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _logprobs(response: ShownResponse) -> np.ndarray:
    return response.logprobs


def _versions(response: ShownResponse) -> np.ndarray:
    return response.versions
