"""How held-out tasks were answered in an evaluation, kept next to a run's step files for people to read.

    RUN/rollouts/eval_<step>.jsonl      a line for each answer

A file appears under its name when it is complete; an evaluation that is repeated replaces it.
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.environments.base import Task, Verdict
from k25_train.errors import DataError
from k25_train.metrics.conversations_page import Conversation

LONGEST_EXPECTED = 200
"""Characters of a reference that is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A task with an answer to it."""

    task: Task
    """What was asked."""
    text: str
    """What was generated, special tokens by name."""
    num_tokens: int
    """Of it."""
    verdict: Verdict
    """What the judge made of it."""


def answers_path(folder: Path, step: int) -> Path:
    """File of the evaluation after a step; `folder`: of the step files."""
    return folder / f"eval_{step}.jsonl"


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write the answers of an evaluation. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_line(answer), ensure_ascii=False) + "\n" for answer in answers]
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def read_answers(path: Path) -> list[Conversation]:
    """What `write_answers` wrote. Raises DataError for anything else."""
    try:
        return [_conversation(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no answers of an evaluation ({error!r}). Leave it out.") from error


def evaluations(folder: Path) -> dict[int, Path]:
    """Step -> file of the evaluation after it, in order."""
    found = {path.stem.removeprefix("eval_"): path for path in folder.glob("eval_*.jsonl")}
    return {int(step): found[step] for step in sorted((name for name in found if name.isdigit()), key=int)}


def prompt_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """The messages as text, images by name; who speaks is said where it is not the user alone."""
    said = [(message["role"], _content_text(message["content"])) for message in messages]
    if [role for role, _ in said] == ["user"]:
        return said[0][1]
    return "\n".join(f"{role}: {text}" for role, text in said)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in content)


def _line(answer: Answer) -> dict[str, Any]:
    reference = answer.task.reference
    expected = reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)
    return {
        "task": answer.task.key,
        "prompt": prompt_text(answer.task.messages),
        "images": [base64.b64encode(image).decode() for image in answer.task.media],
        "expected": expected if len(expected) <= LONGEST_EXPECTED and reference is not None else "",
        "response": answer.text,
        "num_tokens": answer.num_tokens,
        **answer.verdict.as_json(),
    }


def _conversation(line: Mapping[str, Any]) -> Conversation:
    return Conversation(
        task=line["task"],
        prompt=line["prompt"],
        images=tuple(base64.b64decode(image) for image in line["images"]),
        expected=line["expected"],
        response=line["response"],
        num_tokens=line["num_tokens"],
        reward=math.nan if line["reward"] is None else line["reward"],
        reason=line["reason"],
    )
