"""What of a conversation is learned, and what nobody should learn: answers that are empty or cut off, and
calls that no tool can read."""

import json
from collections.abc import Sequence
from typing import Any

from k25_train.data.chat.fields import optional
from k25_train.data.formats.sample_json import SampleError

_NOT_LEARNED = 'Mark it with "loss": false if it shall only be shown'


def is_learned(value: dict[str, Any], is_assistant: bool, where: str) -> bool:
    """Whether what the assistant generates is a training target: its own words, unless the message says not.

    Raises SampleError for a message of somebody else that asks for it.
    """
    loss = optional(value, "loss", bool, where)
    weight = value.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise SampleError(f"`weight` of {where} is {weight!r}; it may be 0 or 1")
    asked = loss if loss is not None else weight if weight is None else weight == 1
    if asked and not is_assistant:
        raise SampleError(f"{where} is not the assistant's, whose words alone are learned")
    return is_assistant if asked is None else asked


def check_learned(value: dict[str, Any], texts: Sequence[str], arguments: Sequence[str], where: str) -> None:
    """Raises SampleError for a learned message that ends at a limit, has a call whose `arguments` are no JSON
    object, or says nothing and calls nothing; `texts` are its answer."""
    if optional(value, "finish_reason", str, where) == "length":
        raise SampleError(
            f"{where} was cut off at a limit of tokens (`finish_reason` is length), so its end is no end. "
            f"{_NOT_LEARNED}"
        )
    for number, text in enumerate(arguments):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SampleError(
                f"the arguments of {where}, tool call {number} are not valid JSON ({error}). {_NOT_LEARNED}"
            ) from error
        if not isinstance(found, dict):
            raise SampleError(
                f"the arguments of {where}, tool call {number} are JSON, but no object. {_NOT_LEARNED}"
            )
    if not arguments and not "".join(texts).strip():
        raise SampleError(f"{where} is an empty answer. {_NOT_LEARNED}")
