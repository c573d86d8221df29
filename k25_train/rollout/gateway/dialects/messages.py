"""Anthropic's Messages: POST /v1/messages.

Thoughts come as `thinking` blocks; their signature is of no use, since nothing of a history is taken from it:
what was generated is known by its digest. `"return_token_ids": true` adds token ids to the answer.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from k25_train.rollout.gateway.conversation import (
    Answer,
    Asked,
    Event,
    Finish,
    Kind,
    Message,
    RefusedError,
    ids_of,
)
from k25_train.rollout.gateway.dialects import reading
from k25_train.rollout.gateway.dialects.reading import mapping, needed, typed

REFUSED: dict[str, tuple[Any, ...]] = {
    "stop_sequences": ([],),
    "tool_choice": ({"type": "auto"}, {"type": "auto", "disable_parallel_tool_use": False}),
    "container": (),
    "mcp_servers": ([],),
    "output_format": (),
}
"""Key -> values that are taken."""
FINISH = {Finish.stop: "end_turn", Finish.calls: "tool_use", Finish.length: "max_tokens"}
TYPES = {
    Kind.unauthorized: "authentication_error",
    Kind.unknown: "not_found_error",
    Kind.too_large: "request_too_large",
    Kind.too_many: "rate_limit_error",
    Kind.failed: "api_error",
    Kind.no_engine: "overloaded_error",
}
KEEP_ALIVE = Event({"type": "ping"}, "ping").encode()
"""What is sent while nothing else is."""
TOO_LONG = "prompt is too long: "
"""How Anthropic's message about an overflow begins, by which clients know that they have to compact."""


def parse(body: Mapping[str, Any]) -> Asked:
    """The request. Raises `RefusedError` if it is not of this form, or asks for what is not to be had."""
    reading.refuse(body, REFUSED)
    found = needed(body, "messages", list)
    messages = [*_system(body.get("system"))]
    for at, each in enumerate(found):
        messages += _messages(mapping(each, f"messages[{at}]"), f"messages[{at}]")
    if not messages:
        raise reading.invalid("messages", "must not be empty")
    return Asked(
        model=typed(body, "model", str) or "",
        messages=tuple(messages),
        tools=tuple(_tool(each, at) for at, each in enumerate(typed(body, "tools", list) or ())),
        max_tokens=reading.limit_of(body, "max_tokens"),
        stream=bool(typed(body, "stream", bool)),
        wants_ids=bool(typed(body, "return_token_ids", bool)),
        ignored=reading.ignored_of(body),
    )


def _system(value: Any) -> tuple[Message, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (Message(role="system", parts=(value,)),) if value else ()
    if not isinstance(value, list):
        raise reading.invalid("system", "must be text or a list of text blocks")
    texts = [needed(mapping(each, f"system[{at}]"), "text", str, "system") for at, each in enumerate(value)]
    return (Message(role="system", parts=("\n\n".join(texts),)),)


def _messages(value: Mapping[str, Any], where: str) -> Iterator[Message]:
    """Messages that one of Anthropic's is: results of tools are messages of their own."""
    role, content = needed(value, "role", str, where), value.get("content")
    if role not in ("user", "assistant", "system"):
        raise reading.invalid(f"{where}.role", f"is {role!r}; known ones: user, assistant, system")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise reading.invalid(f"{where}.content", "must be text or a list of blocks")
    parts: list[str | bytes] = []
    calls, reasoning = [], ""
    for at, each in enumerate(blocks):
        place = f"{where}.content[{at}]"
        block = mapping(each, place)
        kind = block.get("type")
        if kind == "tool_use" and role == "assistant":
            calls.append(reading.call_of(block.get("id"), block.get("name"), block.get("input"), place))
        elif kind in ("thinking", "redacted_thinking") and role == "assistant":
            reasoning += str(block.get("thinking") or "")
        elif kind == "tool_result" and role == "user":
            if parts:
                yield Message(role="user", parts=tuple(parts))
                parts = []
            content_parts = reading.parts_of(block.get("content"), f"{place}.content", _part)
            yield Message(role="tool", parts=content_parts, call_id=str(block.get("tool_use_id") or ""))
        else:
            parts.append(_part(block, place))
    if parts or role == "assistant":
        yield Message(role=role, parts=tuple(parts), calls=tuple(calls), reasoning=reasoning)


def _part(block: Mapping[str, Any], where: str) -> str | bytes:
    kind = block.get("type")
    if kind == "text":
        return needed(block, "text", str, where)
    if kind == "image":
        source = mapping(block.get("source"), f"{where}.source")
        if source.get("type") == "base64":
            uri = f"data:{source.get('media_type')};base64,{source.get('data')}"
            return reading.image_of(uri, f"{where}.source")
        return reading.image_of(str(source.get("url", "")), f"{where}.source")
    raise reading.invalid(
        f"{where}.type", f"is {kind!r}; known ones: text, image, thinking, tool_use, tool_result"
    )


def _tool(value: Any, at: int) -> dict[str, Any]:
    where = f"tools[{at}]"
    tool = mapping(value, where)
    if tool.get("type") not in (None, "custom"):
        raise reading.invalid(f"{where}.type", f"is {tool['type']!r}, which runs at Anthropic; use your own")
    return reading.tool_of(tool.get("name"), tool.get("description"), tool.get("input_schema"), where)


def answer_json(asked: Asked, answer: Answer) -> dict[str, Any]:
    """The whole answer."""
    ids = ids_of(asked, answer)
    return {
        **_head(asked, answer),
        "content": _blocks(answer),
        "stop_reason": FINISH[answer.finish],
        "stop_sequence": None,
        "usage": usage(answer),
        **ids.message,
    }


def events(asked: Asked, answer: Answer) -> Iterator[Event]:
    """The answer, block by block."""

    def event(kind: str, **more: Any) -> Event:
        return Event({"type": kind, **more}, kind)

    begun = {**usage(answer), "output_tokens": 0}
    message = {
        **_head(asked, answer),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": begun,
    }
    yield event("message_start", message=message)
    for index, block in enumerate(_blocks(answer)):
        opened, deltas = _opened(block)
        yield event("content_block_start", index=index, content_block=opened)
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    delta = {"stop_reason": FINISH[answer.finish], "stop_sequence": None, **ids_of(asked, answer).message}
    yield event("message_delta", delta=delta, usage=usage(answer))
    yield event("message_stop")


def _opened(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block before anything is in it, and what comes into it."""
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    if block["type"] == "thinking":
        deltas = [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
        return {**block, "thinking": "", "signature": ""}, deltas
    said = json.dumps(block["input"], ensure_ascii=False)
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": said}]


def error_json(error: RefusedError) -> dict[str, Any]:
    """An error as Anthropic has it."""
    is_overflow = error.kind is Kind.overflow
    message = TOO_LONG + error.message if is_overflow else error.message
    kind = TYPES.get(error.kind, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_event(error: RefusedError) -> Event:
    """An error in a stream that has begun."""
    return Event(error_json(error), "error")


def usage(answer: Answer) -> dict[str, Any]:
    """Counts of tokens: those that were in the cache are none of the input's."""
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": answer.num_tokens,
    }


def _head(asked: Asked, answer: Answer) -> dict[str, Any]:
    return {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "model": asked.model}


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    message = answer.message
    found: list[dict[str, Any]] = []
    if message.reasoning:
        found.append({"type": "thinking", "thinking": message.reasoning, "signature": message.digest})
    if message.text:
        found.append({"type": "text", "text": message.text})
    for call in message.calls:
        arguments = json.loads(call.arguments)
        found.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return found
