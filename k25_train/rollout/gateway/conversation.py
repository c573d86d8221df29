"""What the three APIs have in common: a conversation that is asked about, and the answer to it.

Chat Completions ─┐                                        ┌─► Chat Completions
Responses ────────┼─► Asked ─► turns of the policy ─► Answer ┼─► Responses
Messages ─────────┘                                        └─► Messages
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from k25_train.environments.environment import Tool


class Kind(Enum):
    """What is wrong with a request, or with answering it."""

    invalid = 400
    """It is of no form that the API has, or asks for what would break training."""
    overflow = 4001
    """Its conversation has no room for an answer."""
    unauthorized = 401
    """No session has its key."""
    unknown = 404
    """There is no such session, model or path."""
    too_large = 413
    """Its body is longer than it may be."""
    too_many = 429
    """Its session has as many requests in flight as it may have."""
    failed = 500
    """The gateway failed."""
    no_engine = 503
    """No engine answers."""

    @property
    def status(self) -> int:
        """HTTP status."""
        return 400 if self is Kind.overflow else self.value

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self in (Kind.too_many, Kind.no_engine)


class RefusedError(Exception):
    """A request that gets an error for an answer, in the form of its API."""

    def __init__(self, kind: Kind, message: str, *, code: str = "", key: str = "") -> None:
        """
        Args:
            kind: decides about status and type.
            message: what is wrong, by which rule, and what helps.
            code: what programs tell it by; empty for none.
            key: of the request that is at fault; empty for none.
        """
        super().__init__(message)
        self.kind, self.message, self.code, self.key = kind, message, code, key


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool by the assistant."""

    id: str
    """As the client knows it."""
    name: str
    """Of the tool."""
    arguments: str
    """JSON text."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation, whichever API it came by."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    parts: tuple[str | bytes, ...] = ()
    """Texts, and image files, in reading order."""
    calls: tuple[Call, ...] = ()
    """Of the assistant."""
    call_id: str = ""
    """Of a tool's result: the call that it answers, as the client knows it."""
    reasoning: str = ""
    """What the assistant thought first."""

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> tuple[bytes, ...]:
        """Its image files."""
        return tuple(part for part in self.parts if isinstance(part, bytes))

    @cached_property
    def digest(self) -> str:
        """What two messages have in common that say the same: role, content, calls.

        Of the assistant, blanks around its text and in arguments, their order, ids and reasoning count for
        nothing: clients rewrite them, or leave them out. Others' words count letter by letter.
        """
        is_own = self.role == "assistant"
        said = [self.text.strip()] if is_own else [_named(part) for part in _merged(self.parts)]
        calls = [[call.name, canonical(call.arguments)] for call in self.calls]
        return digest_of([self.role, said, calls])


def _merged(parts: tuple[str | bytes, ...]) -> list[str | bytes]:
    """Parts with neighbouring texts as one, since templates do not tell them apart."""
    found: list[str | bytes] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def _named(part: str | bytes) -> list[str]:
    if isinstance(part, str):
        return ["text", part]
    return ["image", hashlib.blake2b(part, digest_size=16).hexdigest()]


def canonical(arguments: str) -> str:
    """JSON text in one form; what is no JSON stays as it is."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return arguments.strip()


def digest_of(value: Any) -> str:
    """32 hexadecimal digits of anything that JSON has."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, whichever API it came by."""

    model: str
    """As the client calls it."""
    messages: tuple[Message, ...]
    """The conversation, at least one message."""
    tools: tuple[Tool, ...] = ()
    """Declarations as in Chat Completions."""
    max_tokens: int | None = None
    """Most new tokens; None for all that there is room for."""
    stream: bool = False
    """Whether the answer comes as events."""
    usage_in_stream: bool = False
    """Whether events of Chat Completions end with counts of tokens."""
    wants_ids: bool = False
    """Whether token ids are returned."""
    wants_logprobs: bool = False
    """Whether log-probabilities are."""
    ignored: tuple[str, ...] = ()
    """Keys that have no effect, since the run decides about them."""
    instructions: str = ""
    """System prompt in front of all of it, which the next request does not inherit (Responses)."""
    previous: str = ""
    """Id of the answer that the messages follow (Responses); empty where they are all there is."""
    is_kept: bool = False
    """Whether a later request may follow the answer by its id (Responses)."""


class Finish(Enum):
    """Why an answer ended."""

    stop = "stop"
    """By itself."""
    calls = "calls"
    """With calls of tools."""
    length = "length"
    """At its limit of tokens, or of the context's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A generated token, for those who asked for log-probabilities."""

    text: str
    logprob: float
    """In nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the policy said, and what it took."""

    number: int
    """Of the turn in its session, from 0."""
    id: str
    """Unique in its gateway."""
    created: int
    """Seconds since 1970."""
    message: Message
    """Of the assistant."""
    finish: Finish
    """Why it ended."""
    prompt_tokens: int
    """Tokens in front of it, every placeholder included."""
    cached_tokens: int
    """Those of them that an earlier turn had already."""
    token_ids: np.ndarray
    """[n] int32: what was generated."""
    logprobs: np.ndarray
    """[n] float32, nats."""
    prompt_ids: np.ndarray
    """[prompt_tokens] int32; [0] where nobody asked."""
    tokens: tuple[TokenText, ...] = ()
    """One for each generated token, where asked."""

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Event:
    """A server-sent event."""

    data: Mapping[str, Any] | str
    """JSON, or text as it is."""
    name: str = ""
    """Its type; empty for none."""

    def encode(self) -> bytes:
        """As it is sent."""
        text = self.data if isinstance(self.data, str) else json.dumps(self.data)
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {text}\n\n".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """Token ids of an answer under the names of vLLM and of NeMo-Gym; both empty where nobody asked."""

    top: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    message: Mapping[str, Any] = field(default_factory=dict)


def ids_of(asked: Asked, answer: Answer) -> Ids:
    """What is added to an answer in JSON."""
    if not asked.wants_ids:
        return Ids()
    prompt, drawn = answer.prompt_ids.tolist(), answer.token_ids.tolist()
    echoed = {
        "prompt_token_ids": prompt,
        "generation_token_ids": drawn,
        "generation_log_probs": answer.logprobs.tolist(),
    }
    return Ids(top={"prompt_token_ids": prompt}, choice={"token_ids": drawn}, message=echoed)
