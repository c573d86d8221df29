"""What the policy has said, taken apart: Kimi's template read backwards.

    reasoning</think>answer<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0
        <|tool_call_argument_begin|>{…}<|tool_call_end|><|tool_calls_section_end|><|im_end|>

Reasoning and `</think>` are only there where the prompt ends with an open thought.
"""

import json
import re
from typing import Any

from k25_train.environments.environment import Action, ToolCall
from k25_train.errors import K25Error

END = "<|im_end|>"
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_CALL_ID = re.compile(r"functions\.([\w.-]+):(\d+)")


class MalformedCallsError(K25Error):
    """The calls of a reply cannot be read; the text says why."""


def read_reply(text: str, *, thinking: bool) -> Action:
    """A turn as an action; what cannot be read is its `fault`."""
    text = text.strip().removesuffix(END)
    reasoning, fault = "", ""
    if thinking:
        reasoning, ends, text = text.partition("</think>")
        if not ends:
            fault = "endless thought: there is no </think>"
    content, section, behind = text.partition(SECTION)
    calls: tuple[ToolCall, ...] = ()
    try:
        calls = calls_of(behind) if section else ()
    except MalformedCallsError as error:
        fault = str(error)
    return Action(reasoning=reasoning.strip(), content=content.strip(), calls=calls, fault=fault)


def calls_of(section: str) -> tuple[ToolCall, ...]:
    """The calls behind `SECTION`. Raises `MalformedCallsError`."""
    body, ends, behind = section.partition(SECTION_END)
    if not ends or behind.strip():
        raise MalformedCallsError("malformed tool call: the section of calls does not end the response")
    first, *written = body.split(_CALL)
    if first.strip() or not written:
        raise MalformedCallsError("malformed tool call: the section does not begin with a call")
    return tuple(_call(text) for text in written)


def as_message(action: Action) -> dict[str, Any]:
    """A turn as a conversation has it (`data/chat/messages.py`)."""
    message: dict[str, Any] = {"role": "assistant", "content": action.content}
    if action.reasoning:
        message["reasoning_content"] = action.reasoning
    if action.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in action.calls
        ]
    return message


def as_reply(action: Action, *, thinking: bool) -> str:
    """A turn as a policy writes it, without what ends it: `read_reply` gives the turn again."""
    thought = f"{action.reasoning}</think>" if thinking else ""
    calls = "".join(
        f"{_CALL}{call.id}{_ARGUMENTS}{json.dumps(dict(call.arguments), ensure_ascii=False)}{_CALL_END}"
        for call in action.calls
    )
    return thought + action.content + (f"{SECTION}{calls}{SECTION_END}" if calls else "")


def _call(text: str) -> ToolCall:
    head, ends, behind = text.partition(_CALL_END)
    if not ends or behind.strip():
        raise MalformedCallsError(f"malformed tool call: it does not end with {_CALL_END}")
    name, divided, arguments = head.partition(_ARGUMENTS)
    named = _CALL_ID.fullmatch(name.strip())
    if not divided or named is None:
        raise MalformedCallsError(f"malformed tool call: {name.strip()[:40]!r} is not functions.NAME:NUMBER")
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise MalformedCallsError(f"malformed tool call: the arguments of {named[1]} are no JSON object")
    return ToolCall(id=name.strip(), name=named[1], arguments=value)
