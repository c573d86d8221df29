"""What a response consists of (`environments/reply.py`), and what of it no judge need look at."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from k25_train.environments.base import Response, Task
from k25_train.environments.environment import ToolCall
from k25_train.environments.reply import END, SECTION, MalformedCallsError, calls_of
from k25_train.rl.rewards.faults import MAX_CHARACTERS, ResponseFaultError

_SPECIAL = re.compile(r"<\|[a-z_]+\|>|</?think>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response, taken apart."""

    reasoning: str
    """What the model thought before; empty for none."""
    content: str
    """What it answers, without white space at the ends."""
    calls: tuple[ToolCall, ...]
    """Tools that it calls."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What was left in a sandbox."""


def answer_of(task: Task, response: Response) -> Answer:
    """Take a response apart.

    Raises ResponseFaultError, whose text is the reason of the verdict: empty, at the limit of tokens, too
    long, a thought that never ends, a malformed call of a tool, or a special token within the answer.
    """
    text = response.text
    if len(text) > MAX_CHARACTERS:
        raise ResponseFaultError(f"huge: {len(text)} characters, more than {MAX_CHARACTERS}")
    if not response.ended:
        raise ResponseFaultError(f"at the limit: not ended after {response.num_tokens} tokens")
    text = text.strip().removesuffix(END)
    reasoning = ""
    if task.thinking:
        reasoning, ends, text = text.partition("</think>")
        if not ends:
            raise ResponseFaultError("endless thought: the response has no </think>")
    content, section, calls = text.partition(SECTION)
    special = _SPECIAL.search(content)
    if special:
        raise ResponseFaultError(f"special token: {special[0]} within the answer")
    if not content.strip() and not section:
        raise ResponseFaultError("empty: the response has no answer")
    return Answer(
        reasoning=reasoning.strip(),
        content=content.strip(),
        calls=_calls(calls) if section else (),
        files=response.files,
    )


def content_of(response: Response) -> str:
    """What a response says behind its thoughts, without calls of tools, whatever is wrong with it."""
    text = response.text.strip().removesuffix(END).rpartition("</think>")[2]
    return text.partition(SECTION)[0].strip()


def _calls(section: str) -> tuple[ToolCall, ...]:
    try:
        return calls_of(section)
    except MalformedCallsError as error:
        raise ResponseFaultError(str(error)) from error
