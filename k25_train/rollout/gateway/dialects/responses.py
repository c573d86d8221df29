"""OpenAI's Responses: POST /v1/responses.

A conversation may be sent whole, or as what follows an earlier answer (`previous_response_id`), which the
session keeps whatever `store` says. `"return_token_ids": true` adds token ids to the message.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from k25_train.rollout.gateway.conversation import (
    Answer,
    Asked,
    Call,
    Event,
    Finish,
    Message,
    RefusedError,
    ids_of,
)
from k25_train.rollout.gateway.dialects import chat, reading
from k25_train.rollout.gateway.dialects.reading import mapping, needed, typed

PREFIX = "resp_"
REFUSED = {
    "background": (False,),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("auto",),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (0,),
}
"""Key -> values that are taken."""
KEEP_ALIVE = chat.KEEP_ALIVE
error_json = chat.error_json
"""Errors are as in Chat Completions."""


def parse(body: Mapping[str, Any]) -> Asked:
    """The request. Raises `RefusedError` if it is not of this form, or asks for what is not to be had."""
    text = body.get("text")
    if isinstance(text, Mapping) and text.get("verbosity") is not None:
        # Of the distribution; clients send it with the format.
        body = {**body, "text": {key: each for key, each in text.items() if key != "verbosity"}}
    reading.refuse(body, REFUSED)
    messages = _messages(body.get("input"))
    if not messages:
        raise reading.invalid("input", "must not be empty")
    return Asked(
        model=typed(body, "model", str) or "",
        messages=tuple(messages),
        tools=tuple(_tool(each, at) for at, each in enumerate(typed(body, "tools", list) or ())),
        max_tokens=reading.limit_of(body, "max_output_tokens"),
        stream=bool(typed(body, "stream", bool)),
        wants_ids=bool(typed(body, "return_token_ids", bool)),
        ignored=reading.ignored_of(body),
        instructions=typed(body, "instructions", str) or "",
        is_kept=True,
        previous=(typed(body, "previous_response_id", str) or "").removeprefix(PREFIX),
    )


def _messages(value: Any) -> list[Message]:
    """Messages that the items are: reasoning, text and calls of one turn are items of their own."""
    if isinstance(value, str):
        return [Message(role="user", parts=(value,))] if value else []
    if not isinstance(value, list):
        raise reading.invalid("input", "must be text or a list of items")
    found: list[Message] = []
    for at, each in enumerate(value):
        where = f"input[{at}]"
        message = _message(mapping(each, where), where)
        before = found[-1] if found else None
        if before is not None and before.role == message.role == "assistant":
            found[-1] = Message(
                role="assistant",
                parts=before.parts + message.parts,
                calls=before.calls + message.calls,
                reasoning=before.reasoning + message.reasoning,
            )
        else:
            found.append(message)
    return found


def _message(item: Mapping[str, Any], where: str) -> Message:
    kind = item.get("type", "message")
    if kind == "message":
        role = needed(item, "role", str, where)
        if role not in chat.ROLES or role == "tool":
            raise reading.invalid(
                f"{where}.role", f"is {role!r}; known ones: system, developer, user, assistant"
            )
        return Message(
            role=chat.ROLES[role], parts=reading.parts_of(item.get("content"), f"{where}.content", _part)
        )
    if kind == "function_call":
        call = reading.call_of(item.get("call_id"), item.get("name"), item.get("arguments"), where)
        return Message(role="assistant", calls=(call,))
    if kind == "function_call_output":
        call_id = needed(item, "call_id", str, where)
        return Message(
            role="tool", parts=reading.parts_of(item.get("output"), f"{where}.output", _part), call_id=call_id
        )
    if kind == "reasoning":
        texts = [each.get("text", "") for each in item.get("content") or () if isinstance(each, Mapping)]
        return Message(role="assistant", reasoning="".join(map(str, texts)))
    raise reading.invalid(
        f"{where}.type",
        f"is {kind!r}; known ones: message, function_call, function_call_output, reasoning",
    )


def _part(part: Mapping[str, Any], where: str) -> str | bytes:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return needed(part, "text", str, where)
    if kind == "refusal":
        return needed(part, "refusal", str, where)
    if kind == "input_image":
        return reading.image_of(part.get("image_url"), f"{where}.image_url")
    raise reading.invalid(f"{where}.type", f"is {kind!r}; known ones: input_text, output_text, input_image")


def _tool(value: Any, at: int) -> dict[str, Any]:
    where = f"tools[{at}]"
    tool = mapping(value, where)
    if tool.get("type") != "function":
        raise reading.invalid(
            f"{where}.type", f"is {tool.get('type')!r}, which runs at OpenAI; use functions"
        )
    return reading.tool_of(tool.get("name"), tool.get("description"), tool.get("parameters"), where)


def answer_json(asked: Asked, answer: Answer) -> dict[str, Any]:
    """The whole answer."""
    is_cut = answer.finish is Finish.length
    return {
        **_head(asked, answer),
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": [_item(asked, answer, part) for part in _said(answer)],
        "usage": usage(answer),
    }


def events(asked: Asked, answer: Answer) -> Iterator[Event]:
    """The answer, item by item."""
    number = -1

    def event(kind: str, **more: Any) -> Event:
        nonlocal number
        number += 1
        return Event({"type": kind, "sequence_number": number, **more}, kind)

    begun = {**_head(asked, answer), "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, said in enumerate(_said(answer)):
        item = _item(asked, answer, said)
        where = {"item_id": item["id"], "output_index": index}
        yield event("response.output_item.added", output_index=index, item=_opened(item))
        if isinstance(said, Call):
            text = said.arguments
            yield event("response.function_call_arguments.delta", **where, delta=text)
            yield event("response.function_call_arguments.done", **where, name=said.name, arguments=text)
        else:
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            part, where = item["content"][0], {**where, "content_index": 0}
            more = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
            yield event("response.content_part.added", **where, part={**part, "text": ""})
            yield event(f"response.{kind}.delta", **where, delta=part["text"], **more)
            yield event(f"response.{kind}.done", **where, text=part["text"], **more)
            yield event("response.content_part.done", **where, part=part)
        yield event("response.output_item.done", output_index=index, item=item)
    kind = "incomplete" if answer.finish is Finish.length else "completed"
    yield event(f"response.{kind}", response=answer_json(asked, answer))


def error_event(error: RefusedError) -> Event:
    """An error in a stream that has begun."""
    told = error_json(error)["error"]
    kept = {key: told[key] for key in ("code", "message", "param")}
    return Event({"type": "error", "sequence_number": 0, **kept}, "error")


def usage(answer: Answer) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.num_tokens,
    }


def _head(asked: Asked, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"{PREFIX}{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "model": asked.model,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": PREFIX + asked.previous if asked.previous else None,
        "tool_choice": "auto",
        "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in asked.tools],
    }


def _said(answer: Answer) -> Iterator[str | Call]:
    """What becomes an item each: a kind of text, or a call."""
    if answer.message.reasoning:
        yield "reasoning"
    if answer.message.text or not answer.message.calls:
        yield "message"
    yield from answer.message.calls


def _item(asked: Asked, answer: Answer, said: str | Call) -> dict[str, Any]:
    status = "incomplete" if answer.finish is Finish.length else "completed"
    if isinstance(said, Call):
        call = {"call_id": said.id, "name": said.name, "arguments": said.arguments, "status": status}
        return {"type": "function_call", "id": f"fc_{answer.id}_{said.id}", **call}
    if said == "reasoning":
        content = [{"type": "reasoning_text", "text": answer.message.reasoning}]
        return {"type": "reasoning", "id": f"rs_{answer.id}", "summary": [], "content": content}
    logprobs = [
        {"token": token.text, "logprob": token.logprob, "bytes": [], "top_logprobs": []}
        for token in answer.tokens
    ]
    part = {"type": "output_text", "text": answer.message.text, "annotations": [], "logprobs": logprobs}
    head = {"type": "message", "id": f"msg_{answer.id}", "role": "assistant", "status": status}
    return {**head, "content": [part], **ids_of(asked, answer).message}


def _opened(item: dict[str, Any]) -> dict[str, Any]:
    """An item before anything is in it."""
    if item["type"] == "function_call":
        return {**item, "arguments": "", "status": "in_progress"}
    return {**item, "content": [], **({"status": "in_progress"} if "status" in item else {})}
