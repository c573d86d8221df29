"""OpenAI's Responses form, in which NeMo-Gym asks and is answered, from and to messages.

Source: nemo-gym 0.4, `openai_utils.py`; OpenAI's `ResponseCreateParams`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from k25_train.environments.adapters.messages import image_of, tool
from k25_train.environments.environment import Action, Tool

NAME_OF_MODEL = "policy"
"""What answers say of the model; servers do not read it."""


def messages_of(given: object) -> tuple[tuple[Mapping[str, Any], ...], tuple[bytes, ...]]:
    """Messages and images of a `responses_create_params.input`. Raises ValueError for what is no prompt."""
    if isinstance(given, str):
        return ({"role": "user", "content": given},), ()
    if not isinstance(given, list) or not given:
        raise ValueError("input is neither a text nor a list of messages")
    messages: list[Mapping[str, Any]] = []
    media: list[bytes] = []
    for item in given:
        if not isinstance(item, Mapping) or item.get("type", "message") != "message" or "role" not in item:
            raise ValueError(f"input has an item that is no message: {str(item)[:120]}")
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": _content(item.get("content"), media)})
    return tuple(messages), tuple(media)


def _content(content: object, media: list[bytes]) -> Any:
    if isinstance(content, str):
        return content
    if type(content) is not list:
        raise ValueError(f"content is neither a text nor a list of parts: {str(content)[:120]}")
    parts: list[Mapping[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": str(part["text"])})
            continue
        image = image_of(part.get("image_url")) if kind == "input_image" else None
        if image is None:
            raise ValueError(f"a part is neither text nor an image as a data URI: {str(part)[:120]}")
        media.append(image)
        parts.append({"type": "image", "image": f"prompt/{len(media)}"})
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "".join(texts) if len(texts) == len(parts) else parts


def tools_of(given: object) -> tuple[Tool, ...]:
    """Tools of `responses_create_params.tools`. Raises ValueError for other ones than functions."""
    if given is None:
        return ()
    if type(given) is not list:
        raise ValueError("tools is no list")
    found = []
    for each in given:
        if not isinstance(each, Mapping) or each.get("type") != "function" or not each.get("name"):
            raise ValueError(f"a tool is no function: {str(each)[:120]}")
        parameters = each.get("parameters") or {"type": "object", "properties": {}}
        found.append(tool(str(each["name"]), str(each.get("description") or ""), parameters))
    return tuple(found)


def items_of(action: Action, number: int) -> list[dict[str, Any]]:
    """What a turn of the policy is in the list of outputs. `number`: of the turn."""
    items: list[dict[str, Any]] = []
    if action.reasoning:
        summary = [{"type": "summary_text", "text": action.reasoning}]
        items.append({"type": "reasoning", "id": f"rs_{number}", "summary": summary})
    if action.content or not action.calls:
        part = {"type": "output_text", "text": action.content, "annotations": []}
        items.append(
            {
                "type": "message",
                "id": f"msg_{number}",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
        )
    items += [
        {
            "type": "function_call",
            "id": f"fc_{number}_{at}",
            "call_id": call.id,
            "name": call.name,
            "arguments": json.dumps(call.arguments),
            "status": "completed",
        }
        for at, call in enumerate(action.calls)
    ]
    return items


def response_of(key: str, outputs: Sequence[Mapping[str, Any]], tools: object) -> dict[str, Any]:
    """A whole response, as `/verify` and `/step` take it."""
    return {
        "id": f"resp_{key}",
        "created_at": 0,
        "model": NAME_OF_MODEL,
        "object": "response",
        "output": list(outputs),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": tools or [],
    }
