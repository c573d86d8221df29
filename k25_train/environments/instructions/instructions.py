"""Adds instructions to a task, and says which of them an answer follows.

    Task ─► drawn by its key: kinds of different groups ─► sentences behind the prompt, `Task.instructions`
    verdict, answer ─► reward · share of the instructions that it follows; the share is a part of the verdict

An answer that is wrong earns nothing for following them, and what accuracy counts as stays the same.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from k25_train.environments.base import ACCURACY, Status, Task, Verdict, scored
from k25_train.environments.diversify.diversify import with_sentence
from k25_train.environments.diversify.texts import ANSWERED, LAST_LINE
from k25_train.environments.instructions.kinds import KINDS, prose

PART = "instructions"
"""Part of a verdict: share of the instructions that were followed."""
WHOLE_ANSWER = ("ocr",)
"""Judges that compare the whole answer, which has no room for anything else."""


def instructed(task: Task, most: int) -> Task:
    """The task with one to `most` instructions; with none where its answer has no room for any."""
    if task.judge in WHOLE_ANSWER or most < 1:
        return task
    rng = random.Random(f"instructions {task.key}")
    groups = sorted({kind.group for kind in KINDS.values()})
    chosen = rng.sample(groups, rng.randint(1, min(most, len(groups))))
    drawn: list[Mapping[str, Any]] = []
    for group in chosen:
        name = rng.choice([name for name, kind in KINDS.items() if kind.group == group])
        drawn.append({"kind": name, **KINDS[name].draw(rng)})
    said = " ".join(KINDS[each["kind"]].say(each) for each in drawn)
    if task.judge in ANSWERED:
        # What is asked for takes the place of a last line that is nothing but the answer.
        said = f"{said} {LAST_LINE['en']}"
    messages = (*task.messages[:-1], with_sentence(task.messages[-1], said))
    return replace(task, messages=messages, instructions=tuple(drawn))


def followed(instructions: Sequence[Mapping[str, Any]], content: str) -> list[bool]:
    """Whether an answer follows each instruction."""
    text = prose(content)
    return [KINDS[each["kind"]].holds(text, each) for each in instructions]


def with_instructions(task: Task, content: str, verdict: Verdict) -> Verdict:
    """A verdict with what following the task's instructions makes of it."""
    if not task.instructions or verdict.status is not Status.SCORED:
        return verdict
    holds = followed(task.instructions, content)
    share = sum(holds) / len(holds)
    reward = verdict.reward * share if verdict.reward > 0 else verdict.reward
    parts = {ACCURACY: verdict.accuracy, **verdict.parts, PART: share}
    missed = [each["kind"] for each, is_held in zip(task.instructions, holds, strict=True) if not is_held]
    reason = verdict.reason or (f"instructions missed: {', '.join(missed)}" if missed else "")
    return scored(reward, parts, reason)
