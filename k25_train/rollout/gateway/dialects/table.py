"""The APIs by their paths."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from k25_train.rollout.gateway.conversation import Answer, Asked, Event, RefusedError
from k25_train.rollout.gateway.dialects import chat, messages, responses


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One API, in pure functions."""

    path: str
    """Where it is asked."""
    parse: Callable[[Mapping[str, Any]], Asked]
    """Request -> what is asked; raises `RefusedError`."""
    answer_json: Callable[[Asked, Answer], dict[str, Any]]
    """The whole answer."""
    events: Callable[[Asked, Answer], Iterator[Event]]
    """The answer as events."""
    error_json: Callable[[RefusedError], dict[str, Any]]
    """An error."""
    error_event: Callable[[RefusedError], Event]
    """An error in a stream that has begun."""
    keep_alive: bytes
    """What a stream has while nothing happens."""


CHAT = Dialect(
    path="/v1/chat/completions",
    parse=chat.parse,
    answer_json=chat.answer_json,
    events=chat.events,
    error_json=chat.error_json,
    error_event=chat.error_event,
    keep_alive=chat.KEEP_ALIVE,
)
RESPONSES = Dialect(
    path="/v1/responses",
    parse=responses.parse,
    answer_json=responses.answer_json,
    events=responses.events,
    error_json=responses.error_json,
    error_event=responses.error_event,
    keep_alive=responses.KEEP_ALIVE,
)
MESSAGES = Dialect(
    path="/v1/messages",
    parse=messages.parse,
    answer_json=messages.answer_json,
    events=messages.events,
    error_json=messages.error_json,
    error_event=messages.error_event,
    keep_alive=messages.KEEP_ALIVE,
)
DIALECTS = (CHAT, RESPONSES, MESSAGES)
