"""What every engine can do, in token ids: token in, token out.

    prompt ids ─► generate ─► response ids, log-probabilities, spans of versions, why it ended
    tensors    ─► stage ─► commit(version)        two phases: all engines are staged before one commits
    sequences  ─► probe ─► log-probabilities      which have to be the trainer's after every push

Text does not pass: what is trained are the very ids that an engine returned. Images go in as encoded bytes,
one `<|media_pad|>` in the prompt for each; they come back as the placeholders that the trainer expects,
(h/2)(w/2) for each image.

Log-probabilities are the model's own, at temperature 1 over the whole vocabulary, in nats and float32: what
a trainer makes of the same tokens, and what vLLM and SGLang report. Temperature and forbidden ids change
which token is drawn, and nothing of what is reported of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from k25_train.errors import K25Error

if TYPE_CHECKING:
    # Event loops in processes of their own have no use for torch, which takes 300 MB.
    from k25_train.export.stream import NamedTensor


class EngineError(K25Error):
    """An engine did not do what it was asked for; the message names it, and what it answered."""


class EngineLostError(EngineError):
    """An engine is not to be had, or has other weights than it was given: to ask it again does not help until
    it has been given weights."""


class FinishReason(Enum):
    """Why a response ended."""

    stop = "stop"
    """It has one of the ids that end a response, as its last token."""
    length = "length"
    """It has as many tokens as it may have."""
    aborted = "aborted"
    """It was paused; what there is of it is kept, and it can go on."""


class PauseMode(Enum):
    """What becomes of running responses in a pause."""

    keep = "keep"
    """They go on after it, with the weights that there are then."""
    abort = "abort"
    """They end, with `FinishReason.aborted` and the tokens that they have."""


class VersionSpan(NamedTuple):
    """Tokens of a response that were made by one version of the weights."""

    version: int
    """The optimizer step whose weights these were."""
    start: int
    """First token, counted in the response."""
    stop: int
    """Behind the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of one response are drawn."""

    max_tokens: int
    """Most tokens, those that `Request.response_ids` has already included."""
    temperature: float
    """Above 0; 0 for the most probable token."""
    seed: int
    """With the token's position in the response all that its draw depends on (engines that can)."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""
    forbidden_ids: tuple[int, ...]
    """Ids that are never drawn: those of media, whose embeddings engines treat differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to be generated, or to be gone on with."""

    key: str
    """Names it in messages and logs; the same for every try."""
    prompt_ids: tuple[int, ...]
    """The prompt, with one placeholder for each image."""
    images: tuple[bytes, ...] = ()
    """Encoded images (PNG, JPEG), in the order of their placeholders."""
    response_ids: tuple[int, ...] = ()
    """What the response has already, from an earlier try or phase; it goes on behind it."""
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What an engine has added to a response."""

    prompt_ids: np.ndarray
    """[P] int32: the prompt with every placeholder of its images."""
    token_ids: np.ndarray
    """[n] int32: the new tokens, without those that the request had."""
    logprobs: np.ndarray
    """[n] float32: the log-probability of each, when it was drawn."""
    spans: tuple[VersionSpan, ...]
    """Which versions made them, in order; positions count from the first of these new tokens."""
    finish_reason: FinishReason
    """Why there are no more."""


class ProbeSequence(NamedTuple):
    """A fixed sequence whose log-probabilities are compared."""

    token_ids: tuple[int, ...]
    """With one placeholder for each image."""
    images: tuple[bytes, ...]
    """Encoded, in the order of their placeholders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What an engine says of itself."""

    version: int
    """Of the weights that it samples from."""
    running: int
    """Responses that are generated now."""
    waiting: int
    """Requests that wait for room."""
    busy_share: float
    """Share of the time since it was last asked in which it generated, 0 to 1."""
    kv_use: float
    """Share of its room for keys and values that is in use, 0 to 1."""


class Engine(Protocol):
    """Generates responses. Every method may raise `EngineError`; none waits longer than its time limit."""

    @property
    def name(self) -> str:
        """Names it in messages: where it is."""

    async def generate(self, request: Request) -> Generated:
        """Generate one response, or go on with it. May be called for any number at once."""

    async def pause(self, mode: PauseMode) -> None:
        """Stop between two tokens; generates nothing until `resume`. Twice is as once."""

    async def resume(self) -> None:
        """Generate again."""

    async def stage(self, tensors: "Iterable[NamedTensor] | Path", version: int) -> None:
        """Take the weights of a version in, next to those it samples from.

        Args:
            tensors: of the release's names, each taken before the next is made; or a folder of safetensors
                files with them.
            version: the optimizer step that made them.
        """

    async def commit(self, version: int) -> None:
        """Sample from what was staged as `version`, with no cached keys of other weights. Paused engines
        only. Raises `EngineError` if another version, or none, is staged."""

    async def adopt(self, version: int) -> None:
        """Sample from weights that have come by another way (NCCL, checkpoint-engine), as `version`, with no
        cached keys of others. Paused engines only. Raises `EngineError` where there is no such way."""

    async def probe(self, sequences: Sequence[ProbeSequence]) -> list[np.ndarray]:
        """[n - 1] float32 each: the log-probability of every token but the first, given those before it, at
        temperature 1 with all ids allowed; sequences have every placeholder by then. Paused engines answer
        as well: new weights are probed before anything is generated by them."""

    async def state(self) -> EngineState:
        """How it is."""

    async def close(self) -> None:
        """End it, and what it runs."""
