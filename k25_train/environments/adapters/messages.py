"""Messages, tools and rewards, between OpenAI's forms and what other systems send."""

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from k25_train.environments.base import Verdict, scored
from k25_train.environments.environment import Action, Observation, Tool, ToolCall

REWARDS = {"sum": sum, "last": lambda rewards: rewards[-1]}
"""`options.reward` -> what becomes of the rewards of steps."""


def tool(name: str, description: str, parameters: Mapping[str, Any]) -> Tool:
    """A declaration of a tool."""
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": dict(parameters)},
    }


def result(call: ToolCall, text: str) -> Mapping[str, Any]:
    """The message of a call's result."""
    return {"role": "tool", "tool_call_id": call.id, "content": text}


def as_text(value: object) -> str:
    """An observation as text: a text as it is, an object of one text as that text, all else as JSON."""
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(only := next(iter(value.values())), str):
        return only
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def image_of(uri: object) -> bytes | None:
    """The file of a `data:image/…;base64,…` URI; None for what is none."""
    if not isinstance(uri, str) or not uri.startswith("data:image/") or ";base64," not in uri[:64]:
        return None
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except binascii.Error:
        return None


def with_images(value: object) -> tuple[object, tuple[bytes, ...]]:
    """An observation without its images (data URIs), which are named in their place, and the images."""
    images: list[bytes] = []

    def walk(each: object) -> object:
        if isinstance(each, Mapping):
            return {name: walk(inner) for name, inner in each.items()}
        if isinstance(each, list):
            return [walk(inner) for inner in each]
        image = image_of(each)
        if image is None:
            return each
        images.append(image)
        return f"image {len(images)}"

    return walk(value), tuple(images)


def content_of(text: str, images: Sequence[bytes]) -> Any:
    """The content of a message: its text, behind its images."""
    if not images:
        return text
    parts = [{"type": "image", "image": f"observation/{number}"} for number in range(1, len(images) + 1)]
    return [*parts, {"type": "text", "text": text}]


def refusal(action: Action, names: Sequence[str]) -> Observation | None:
    """What a policy is told whose calls cannot be read, or are of no tool; None where nothing is wrong."""
    known = f"there are: {', '.join(names)}"
    if action.fault:
        return Observation(messages=({"role": "user", "content": f"{action.fault}. Tools {known}."},))
    unknown = [call for call in action.calls if call.name not in names]
    if not unknown:
        return None
    wrong = {call.id for call in unknown}
    texts = [
        (
            call,
            f"there is no tool {call.name}; {known}"
            if call.id in wrong
            else "not run: another call is of no tool",
        )
        for call in action.calls
    ]
    return Observation(messages=tuple(result(call, text) for call, text in texts))


def is_reward(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def verdict_of(rewards: Sequence[float], rule: str) -> Verdict:
    """The verdict on rewards of steps; 0 without any."""
    reward = float(REWARDS[rule](rewards)) if rewards else 0.0
    return scored(reward, {"environment": reward})
