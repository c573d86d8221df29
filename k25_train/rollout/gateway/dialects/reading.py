"""What requests of all APIs are read with: keys of a type, images, and what is ignored or refused.

What a client asks of the distribution (temperature, top_p …) is ignored, and named in a header of the answer:
the run's own sampling is what is trained. What it asks of the form of an answer, and would not get (several
choices, stop sequences, a schema), is refused, so that no agent acts on what it believes to have.
"""

import binascii
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from k25_train.rollout.engines.image_types import of_data_uri
from k25_train.rollout.gateway.conversation import Call, Kind, RefusedError

DISTRIBUTION = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
        "repetition_penalty", "thinking", "reasoning", "reasoning_effort", "verbosity", "service_tier",
    }
)  # fmt: skip
"""Keys that the run decides about."""
LARGEST_IMAGE = 32 * 2**20
"""Bytes of one image file."""


def invalid(key: str, problem: str) -> RefusedError:
    """The error for a key that is wrong."""
    return RefusedError(Kind.invalid, f"{key}: {problem}", code="invalid_value", key=key)


def typed[T](value: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T | None:
    """The value of a key, None where it is missing or null. Raises `RefusedError` for another type."""
    found = value.get(key)
    name = f"{where}.{key}" if where else key
    if found is None:
        return None
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise invalid(name, f"must be of type {kind.__name__}, not {type(found).__name__}")
    return found


def needed[T](value: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    """The value of a key. Raises `RefusedError` where it is missing, too."""
    found = typed(value, key, kind, where)
    if found is None:
        raise invalid(f"{where}.{key}" if where else key, "is missing")
    return found


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object. Raises `RefusedError` for anything else."""
    if not isinstance(value, Mapping):
        raise invalid(where, f"must be an object, not {type(value).__name__}")
    return value


def limit_of(body: Mapping[str, Any], *keys: str) -> int | None:
    """The first limit of tokens that is given. Raises `RefusedError` unless it is positive."""
    for key in keys:
        found = typed(body, key, int)
        if found is not None:
            if found < 1:
                raise invalid(key, f"must be at least 1, not {found}")
            return found
    return None


def ignored_of(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that have no effect."""
    return tuple(sorted(key for key in body if key in DISTRIBUTION and body[key] is not None))


def refuse(body: Mapping[str, Any], allowed: Mapping[str, Collection[Any]]) -> None:
    """Raises `RefusedError` if a key has a value that would change the form of the answer.

    `allowed`: key -> values that are as good as none.
    """
    for key, values in allowed.items():
        found = body.get(key)
        if found is not None and found not in values:
            raise RefusedError(
                Kind.invalid,
                f"{key}={json.dumps(found)[:80]} is not supported: turns are trained as generated, so "
                f"answers are neither cut nor forced into a form. Leave {key} out of the agent's settings",
                code="unsupported_parameter",
                key=key,
            )


def image_of(url: Any, where: str) -> bytes:
    """The image file of a data URL. Raises `RefusedError` for any other URL."""
    if not isinstance(url, str):
        raise invalid(where, "must be the URL of an image")
    if not url.startswith("data:"):
        raise invalid(
            where,
            "is not a data: URL. The gateway fetches nothing, so that a trajectory holds what was seen: "
            "send the image itself, as data:image/png;base64,…",
        )
    try:
        data = of_data_uri(url)
    except (ValueError, binascii.Error) as error:
        raise invalid(where, f"is no data: URL in Base64 ({error})") from error
    if len(data) > LARGEST_IMAGE:
        raise invalid(where, f"has {len(data):,} bytes, at most {LARGEST_IMAGE:,} are taken: shrink it")
    return data


def parts_of(
    content: Any, where: str, part: Callable[[Mapping[str, Any], str], str | bytes]
) -> tuple[str | bytes, ...]:
    """The texts and images of a message. `part`: reads one of a list, and is told where it is. Raises
    `RefusedError`."""
    if content is None or isinstance(content, str):
        return (content,) if content else ()
    if not isinstance(content, list):
        raise invalid(where, "must be text or a list of parts")
    places = [f"{where}[{at}]" for at in range(len(content))]
    return tuple(part(mapping(each, place), place) for each, place in zip(content, places, strict=True))


def tool_of(name: Any, description: Any, schema: Any, where: str) -> dict[str, Any]:
    """A declaration as in Chat Completions. Raises `RefusedError` for one without a name."""
    if not isinstance(name, str) or not name:
        raise invalid(f"{where}.name", "must be a name")
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = str(description)
    function["parameters"] = dict(mapping(schema if schema is not None else {}, f"{where}.parameters"))
    return {"type": "function", "function": function}


def call_of(call_id: Any, name: Any, arguments: Any, where: str) -> Call:
    """A call of a tool; arguments may be an object or JSON text. Raises `RefusedError` otherwise."""
    if not isinstance(name, str) or not name:
        raise invalid(f"{where}.name", "must be a name")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
    return Call(id=str(call_id or ""), name=name, arguments=arguments)
