"""A conversation as its JSON states it, checked: messages in the form of OpenAI's API, and tools.

    {"messages": [{"role": "user", "content": [{"type": "text", "text": "…"},
                                               {"type": "image", "image": "photos/1.jpg"}]},
                  {"role": "assistant", "reasoning_content": "…", "content": "…", "tool_calls": […]}],
     "tools": [{"type": "function", "function": {"name": "…", "parameters": {…}}}],
     "chat_template_kwargs": {"thinking": true, "preserve_thinking": false}}

Other keys are passed over. What makes no conversation that can be learned from is a SampleError, whose reason
continues the sentence that names file and line.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from k25_train.data.chat.fields import objects, optional, required
from k25_train.data.chat.learned import check_learned, is_learned
from k25_train.data.formats.sample_json import SampleError, parse_sample

ROLES = ("system", "user", "assistant", "tool")
MEDIA_PARTS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Type of a part of a content -> type of its medium."""
_MEDIA_KEYS = ("url", "path")
"""Where else a part may say which file it is."""
_KIMI_CALL = re.compile(r"functions\.(.+):(\d+)")


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video in a content."""

    type: str
    """`image` or `video`."""
    url: str
    """Path next to the file with the conversation, URL, or `data:` URI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool by the assistant."""

    id: str
    """As the model writes it: `functions.NAME:NUMBER`."""
    name: str
    """Of the tool."""
    arguments: str
    """JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn."""

    role: str
    """One of `ROLES`."""
    name: str
    """What the turn is headed with: the message's own name, else its role."""
    content: tuple[str | MediaPart, ...]
    """Text and media in reading order."""
    reasoning: str
    """What the assistant thinks before it answers; empty for none."""
    tool_calls: tuple[ToolCall, ...]
    """Of the assistant."""
    tool_call_id: str
    """Of a tool's result: the call that it answers."""
    learned: bool
    """Whether what the assistant generates is a training target."""

    @property
    def is_answer(self) -> bool:
        """Whether the assistant ends an exchange with it, instead of waiting for a tool."""
        return self.role == "assistant" and not self.tool_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in order up to the last one that is learned."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """Declarations as in OpenAI's API, each with a `type`."""
    thinking: bool | None
    """Whether the assistant is asked to think; None: in each turn that has reasoning."""
    preserve_thinking: bool
    """Whether earlier exchanges keep their reasoning in view, as K2.6's template has it."""


def parse_conversation(line: bytes) -> Conversation:
    """The conversation in one line of JSON.

    Raises SampleError, with the reason alone: no strict JSON in UTF-8, a key twice, an unknown role or part,
    a tool's result without its call, no turn of the assistant to learn from, answers that are empty or cut
    off and calls with arguments that are no JSON object, if they are to be learned, and wrong types.
    """
    content = parse_sample(line, "is not valid JSON")
    where = "the conversation"
    settings = optional(content, "chat_template_kwargs", dict, where) or {}
    messages = _name_calls(objects(required(content, "messages", list, where), "message", _message))
    if not messages:
        raise SampleError("its `messages` are empty")
    while messages and not messages[-1].learned:
        messages = messages[:-1]
    if not messages:
        raise SampleError("no message of the assistant is left to learn from")
    return Conversation(
        messages=messages,
        tools=_tools(content),
        thinking=optional(settings, "thinking", bool, "`chat_template_kwargs`"),
        preserve_thinking=bool(optional(settings, "preserve_thinking", bool, "`chat_template_kwargs`")),
    )


def _message(value: dict[str, Any], where: str) -> Message:
    # 1. Who speaks, and what.
    role = required(value, "role", str, where)
    if role not in ROLES:
        raise SampleError(f"{where} has the role {role!r}; known ones: {', '.join(ROLES)}")
    is_assistant = role == "assistant"
    content = _content(value, where)
    calls = objects(optional(value, "tool_calls", list, where) or [], f"{where}, tool call", _call)
    reasoning = optional(value, "reasoning_content", str, where) or ""

    # 2. What only one role may have.
    if is_assistant:
        _check_assistant(value, content, bool(calls), where)
    else:
        for key, found in (("tool_calls", calls), ("reasoning_content", reasoning)):
            if found:
                raise SampleError(
                    f"{where} has `{key}`, which only the assistant has, but its role is {role}"
                )
        if value.get("content") is None:
            raise SampleError(f"{where} has no `content`")
    answered = required(value, "tool_call_id", str, where) if role == "tool" else ""

    # 3. What is learned.
    learned = is_learned(value, is_assistant, where)
    if learned:
        texts = [part for part in content if isinstance(part, str)]
        check_learned(value, texts, [call.arguments for call in calls], where)
    return Message(
        role=role,
        name=optional(value, "name", str, where) or role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=answered,
        learned=learned,
    )


def _check_assistant(
    value: dict[str, Any], content: tuple[str | MediaPart, ...], has_calls: bool, where: str
) -> None:
    if value.get("function_call"):
        raise SampleError(f"{where} has `function_call`, which OpenAI has replaced; write `tool_calls`")
    if any(isinstance(part, MediaPart) for part in content):
        raise SampleError(f"{where} is the assistant's and has media, which the model does not generate")
    if content and isinstance(content[0], str) and content[0].lstrip().startswith("<think>"):
        # As text it would be learned letter by letter, after an empty thought.
        raise SampleError(f"the content of {where} begins with <think>; put that into `reasoning_content`")
    if not has_calls and value.get("content") is None:
        raise SampleError(f"{where} has neither `content` nor `tool_calls`")


def _content(value: dict[str, Any], where: str) -> tuple[str | MediaPart, ...]:
    content = value.get("content")
    if content is None or isinstance(content, str):
        return (content,) if content else ()
    if not isinstance(content, list):
        raise SampleError(f"the `content` of {where} is a {type(content).__name__}, not a string or a list")
    return objects(content, f"{where}, part", _part)


def _part(value: dict[str, Any], where: str) -> str | MediaPart:
    kind = required(value, "type", str, where)
    if kind == "text":
        return required(value, "text", str, where)
    if kind not in MEDIA_PARTS:
        known = ", ".join(("text", *MEDIA_PARTS))
        raise SampleError(f"{where} has the type {kind!r}; known ones: {known}")
    found = next((value[key] for key in (kind, *_MEDIA_KEYS) if value.get(key) is not None), None)
    if isinstance(found, dict):
        found = found.get("url")
    if not isinstance(found, str) or not found:
        raise SampleError(f"{where} is of type {kind} and names no file: give its path or URL as `{kind}`")
    return MediaPart(MEDIA_PARTS[kind], found)


def _call(value: dict[str, Any], where: str) -> ToolCall:
    function = required(value, "function", dict, where)
    name = required(function, "name", str, f"the function of {where}")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        # As the template writes them: in their own order, with blanks, letters as they are.
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise SampleError(f"the arguments of {where} are neither an object nor JSON text")
    return ToolCall(id=optional(value, "id", str, where) or "", name=name, arguments=arguments)


def _name_calls(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with calls named as the model names them, and results by the same names.

    `functions.NAME:NUMBER`, numbered through the conversation from 0 (MoonshotAI/Kimi-K2,
    docs/tool_call_guidance.md); ids of that form stay.
    """
    renamed: dict[str, str] = {}
    number = 0
    found = []
    for position, message in enumerate(messages):
        calls = []
        for call in message.tool_calls:
            match = _KIMI_CALL.fullmatch(call.id)
            is_kimi = match is not None and match[1] == call.name
            new = call.id if is_kimi else f"functions.{call.name}:{number}"
            renamed[call.id or new] = new
            calls.append(replace(call, id=new))
            number += 1
        answered = message.tool_call_id
        if message.role == "tool" and answered not in renamed:
            raise SampleError(f"message {position} is the result of call {answered!r}, which nobody has made")
        found.append(replace(message, tool_calls=tuple(calls), tool_call_id=renamed.get(answered, "")))
    return tuple(found)


def _tools(content: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = content.get("tools")
    if isinstance(tools, str):
        # Tables with one type per column hold them as text.
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"its `tools` are text that is not valid JSON ({error})") from error
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise SampleError(f"its `tools` are a {type(tools).__name__}, not a list")
    return objects(tools, "tool", _tool)


def _tool(value: dict[str, Any], where: str) -> dict[str, Any]:
    if value.get("type") == "function":
        required(required(value, "function", dict, where), "name", str, f"the function of {where}")
    return value
