"""OpenAI's Chat Completions: POST /v1/chat/completions.

Token ids are returned under vLLM's names (`prompt_token_ids`, `choices[].token_ids`) and NeMo-Gym's (on the
message) where the request says `"return_token_ids": true`, log-probabilities with `"logprobs": true`.
"""

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

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
REFUSED = {
    "n": (1,),
    "stop": ([], ""),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "functions": ([],),
    "web_search_options": (),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
}
"""Key -> values that are taken."""
FINISH = {Finish.stop: "stop", Finish.calls: "tool_calls", Finish.length: "length"}
TYPES = {
    Kind.unauthorized: "authentication_error",
    Kind.too_many: "rate_limit_error",
    Kind.failed: "server_error",
    Kind.no_engine: "server_error",
}
CODES = {
    Kind.overflow: "context_length_exceeded",
    Kind.unauthorized: "invalid_api_key",
    Kind.unknown: "not_found",
}
KEEP_ALIVE = b": keep-alive\n\n"
"""What is sent while nothing else is: a comment."""


def parse(body: Mapping[str, Any]) -> Asked:
    """The request. Raises `RefusedError` if it is not of this form, or asks for what is not to be had."""
    reading.refuse(body, REFUSED)
    found = needed(body, "messages", list)
    messages = tuple(_message(mapping(each, f"messages[{at}]"), at) for at, each in enumerate(found))
    if not messages:
        raise reading.invalid("messages", "must not be empty")
    options = typed(body, "stream_options", dict) or {}
    return Asked(
        model=typed(body, "model", str) or "",
        messages=messages,
        tools=tuple(_tool(each, at) for at, each in enumerate(typed(body, "tools", list) or ())),
        max_tokens=reading.limit_of(body, "max_completion_tokens", "max_tokens"),
        stream=bool(typed(body, "stream", bool)),
        usage_in_stream=bool(options.get("include_usage")),
        wants_ids=bool(typed(body, "return_token_ids", bool)),
        wants_logprobs=bool(typed(body, "logprobs", bool)),
        ignored=reading.ignored_of(body),
    )


def _message(value: Mapping[str, Any], at: int) -> Message:
    where = f"messages[{at}]"
    role = needed(value, "role", str, where)
    if role not in ROLES:
        raise reading.invalid(f"{where}.role", f"is {role!r}; known ones: {', '.join(ROLES)}")
    calls = []
    for number, call in enumerate(typed(value, "tool_calls", list, where) or ()):
        place = f"{where}.tool_calls[{number}]"
        function = mapping(mapping(call, place).get("function"), f"{place}.function")
        calls.append(reading.call_of(call.get("id"), function.get("name"), function.get("arguments"), place))
    reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
    return Message(
        role=ROLES[role],
        parts=reading.parts_of(value.get("content"), f"{where}.content", _part),
        calls=tuple(calls),
        call_id=(typed(value, "tool_call_id", str, where) or "") if role == "tool" else "",
        reasoning=reasoning if isinstance(reasoning, str) and role == "assistant" else "",
    )


def _part(part: Mapping[str, Any], where: str) -> str | bytes:
    kind = part.get("type")
    if kind in ("text", "refusal"):
        return needed(part, kind, str, where)
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        return reading.image_of(url, f"{where}.image_url")
    raise reading.invalid(f"{where}.type", f"is {kind!r}; known ones: text, image_url")


def _tool(value: Any, at: int) -> dict[str, Any]:
    where = f"tools[{at}]"
    tool = mapping(value, where)
    if tool.get("type") != "function":
        raise reading.invalid(f"{where}.type", f"is {tool.get('type')!r}; only function is known")
    function = mapping(tool.get("function"), f"{where}.function")
    return reading.tool_of(
        function.get("name"), function.get("description"), function.get("parameters"), where
    )


def answer_json(asked: Asked, answer: Answer) -> dict[str, Any]:
    """The whole answer."""
    ids = ids_of(asked, answer)
    message: dict[str, Any] = {"role": "assistant", "content": answer.message.text or None, "refusal": None}
    if answer.message.reasoning:
        message["reasoning_content"] = answer.message.reasoning
    if answer.message.calls:
        message["tool_calls"] = _calls(answer)
    else:
        message["content"] = answer.message.text
    choice = {
        "index": 0,
        "message": {**message, **ids.message},
        "logprobs": _logprobs(asked, answer),
        "finish_reason": FINISH[answer.finish],
        **ids.choice,
    }
    head = _head(asked, answer, "chat.completion")
    return {**head, "choices": [choice], "usage": usage(answer), **ids.top}


def events(asked: Asked, answer: Answer) -> Iterator[Event]:
    """The answer in chunks."""
    head = _head(asked, answer, "chat.completion.chunk")
    ids = ids_of(asked, answer)

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> Event:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return Event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    if answer.message.reasoning:
        yield chunk({"reasoning_content": answer.message.reasoning})
    if answer.message.text:
        yield chunk({"content": answer.message.text}, logprobs=_logprobs(asked, answer))
    for number, call in enumerate(_calls(answer)):
        opened = {"index": number, **call, "function": {**call["function"], "arguments": ""}}
        yield chunk({"tool_calls": [opened]})
        said = {"index": number, "function": {"arguments": call["function"]["arguments"]}}
        yield chunk({"tool_calls": [said]})
    last = chunk(dict(ids.message), FINISH[answer.finish], **ids.choice)
    assert isinstance(last.data, Mapping)
    yield Event({**last.data, **ids.top})
    if asked.usage_in_stream:
        yield Event({**head, "choices": [], "usage": usage(answer)})
    yield Event("[DONE]")


def error_json(error: RefusedError) -> dict[str, Any]:
    """An error as OpenAI has it."""
    return {
        "error": {
            "message": error.message,
            "type": TYPES.get(error.kind, "invalid_request_error"),
            "param": error.key or None,
            "code": CODES.get(error.kind, error.code or None),
        }
    }


def error_event(error: RefusedError) -> Event:
    """An error in a stream that has begun."""
    return Event(error_json(error))


def usage(answer: Answer) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.num_tokens,
        "total_tokens": answer.prompt_tokens + answer.num_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _head(asked: Asked, answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": kind,
        "created": answer.created,
        "model": asked.model,
    }


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.message.calls
    ]


def _logprobs(asked: Asked, answer: Answer) -> dict[str, Any] | None:
    if not asked.wants_logprobs:
        return None
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.text.encode("utf-8", "replace")),
            "top_logprobs": [],
        }
        for token in answer.tokens
    ]
    return {"content": content, "refusal": None}
