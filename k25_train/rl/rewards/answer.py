"""What a response consists of in Kimi's template: reasoning, answer, and calls of tools.

    reasoning</think>answer<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0
        <|tool_call_argument_begin|>{…}<|tool_call_end|><|tool_calls_section_end|><|im_end|>

Reasoning and `</think>` are only there where the prompt ends with an open thought (`Task.thinking`).
"""

import json
import re
from dataclasses import dataclass

from k25_train.environments.base import Response, Task
from k25_train.rl.rewards.faults import MAX_CHARACTERS, ResponseFaultError

_END = "<|im_end|>"
_SPECIAL = re.compile(r"<\|[a-z_]+\|>|</?think>")
_CALL_ID = re.compile(r"functions\.([\w.-]+):(\d+)")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool."""

    name: str
    """Of the tool."""
    arguments: str
    """JSON text of an object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response, taken apart."""

    reasoning: str
    """What the model thought before; empty for none."""
    content: str
    """What it answers, without white space at the ends."""
    calls: tuple[Call, ...]
    """Tools that it calls."""


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
    text = text.strip().removesuffix(_END)
    reasoning = ""
    if task.thinking:
        reasoning, ends, text = text.partition("</think>")
        if not ends:
            raise ResponseFaultError("endless thought: the response has no </think>")
    content, section, calls = text.partition("<|tool_calls_section_begin|>")
    special = _SPECIAL.search(content)
    if special:
        raise ResponseFaultError(f"special token: {special[0]} within the answer")
    if not content.strip() and not section:
        raise ResponseFaultError("empty: the response has no answer")
    return Answer(
        reasoning=reasoning.strip(), content=content.strip(), calls=_calls(calls) if section else ()
    )


def _calls(section: str) -> tuple[Call, ...]:
    body, ends, behind = section.partition("<|tool_calls_section_end|>")
    if not ends or behind.strip():
        raise ResponseFaultError("malformed tool call: the section of calls does not end the response")
    first, *written = body.split("<|tool_call_begin|>")
    if first.strip() or not written:
        raise ResponseFaultError("malformed tool call: the section does not begin with a call")
    return tuple(_call(text) for text in written)


def _call(text: str) -> Call:
    head, ends, behind = text.partition("<|tool_call_end|>")
    if not ends or behind.strip():
        raise ResponseFaultError("malformed tool call: it does not end with <|tool_call_end|>")
    name, divided, arguments = head.partition("<|tool_call_argument_begin|>")
    named = _CALL_ID.fullmatch(name.strip())
    if not divided or named is None:
        raise ResponseFaultError(f"malformed tool call: {name.strip()[:40]!r} is not functions.NAME:NUMBER")
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ResponseFaultError(f"malformed tool call: the arguments of {named[1]} are no JSON object")
    return Call(named[1], arguments.strip())
