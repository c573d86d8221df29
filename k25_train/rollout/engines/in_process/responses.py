"""A response while it is generated: what was asked, what there is of it, and who waits for it."""

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.errors import DataError
from k25_train.rollout.engines.base import (
    EngineError,
    FinishReason,
    Generated,
    ProbeSequence,
    Request,
    Sampling,
    VersionSpan,
)
from k25_train.rollout.engines.images import ImagePatches, expand_placeholders, load_image


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids with all placeholders, and the images that belong there."""

    ids: list[int]
    """All of them."""
    images: list[ImagePatches]
    """In the order of their placeholders."""
    encoded: tuple[bytes, ...]
    """The same as they came."""


@dataclass(slots=True, eq=False)
class Response:
    """One response, waiting or in a slot."""

    request: Request
    """What was asked."""
    prompt: Sequence
    """The prompt, expanded."""
    future: "Future[Generated]"
    """What its caller waits for."""
    ids: list[int]
    """Prompt and response so far."""
    token_ids: list[int] = field(default_factory=list)
    """The new ones."""
    logprobs: list[float] = field(default_factory=list)
    """Of each new one, when it was drawn."""
    versions: list[int] = field(default_factory=list)
    """Of the weights that drew each new one."""

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn."""
        return self.request.sampling

    @property
    def position(self) -> int:
        """Of the next token in the response, those of earlier tries included."""
        return len(self.request.response_ids) + len(self.token_ids)

    @property
    def end(self) -> FinishReason | None:
        """Why it has no more tokens; None if it has."""
        last = self.ids[-1] if self.position else None
        if last is not None and last in self.sampling.stop_ids:
            return FinishReason.stop
        return FinishReason.length if self.position >= self.sampling.max_tokens else None

    def add(self, token: int, logprob: float, version: int) -> None:
        """One more token."""
        self.ids.append(token)
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)

    def finish(self, reason: FinishReason) -> None:
        """Give the caller what there is, unless it has gone."""
        generated = Generated(
            prompt_ids=np.array(self.prompt.ids, dtype=np.int32),
            token_ids=np.array(self.token_ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            spans=spans_of(self.versions),
            finish_reason=reason,
        )
        # Not asked for first: it may go from another thread at any moment.
        with suppress(InvalidStateError):
            self.future.set_result(generated)

    def fail(self, error: EngineError) -> None:
        """Tell the caller, unless it has gone."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def spans_of(versions: list[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions."""
    spans: list[VersionSpan] = []
    for place, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = spans[-1]._replace(stop=place + 1)
        else:
            spans.append(VersionSpan(version, place, place + 1))
    return tuple(spans)


def expand(sequence: Request | ProbeSequence, name: str, vision: VisionConfig, media_pad: int) -> Sequence:
    """A prompt, or a probe, with its images decoded and a placeholder for each of their tokens.

    Raises `EngineError` that names it for an image that does not decode, or placeholders that do not fit.
    """
    ids = sequence.prompt_ids if isinstance(sequence, Request) else sequence.token_ids
    try:
        images = [load_image(data, vision) for data in sequence.images]
        expanded = expand_placeholders(ids, [image.grid.num_tokens for image in images], media_pad)
    except DataError as error:
        raise EngineError(f"{name}: {error}") from error
    return Sequence(expanded, images, sequence.images)


def check_request(
    request: Request, prompt: Sequence, name: str, *, vocab_size: int, media_pad: int, longest: int
) -> None:
    """Raises `EngineError` that names a request which cannot be answered."""
    sampling = request.sampling
    ids = (*prompt.ids, *request.response_ids, *sampling.stop_ids, *sampling.forbidden_ids)
    unknown = next((token for token in ids if not 0 <= token < vocab_size), None)
    wrong = ""
    if unknown is not None:
        wrong = f"has the id {unknown}, but the model knows 0 to {vocab_size - 1}"
    elif not prompt.ids:
        wrong = "has an empty prompt"
    elif media_pad in request.response_ids:
        wrong = "has a placeholder in its response; forbid the ids of media in sampling"
    elif sampling.max_tokens < 1 or sampling.temperature < 0:
        wrong = f"has max_tokens={sampling.max_tokens}, temperature={sampling.temperature}"
    elif len(prompt.ids) + sampling.max_tokens > longest:
        wrong = (
            f"may get {len(prompt.ids)} + {sampling.max_tokens} tokens, but positions end at {longest}; "
            "lower rollout.max_prompt_tokens or max_tokens"
        )
    elif len(set(sampling.forbidden_ids)) >= vocab_size:
        wrong = "forbids every id"
    if wrong:
        raise EngineError(f"{name}: {wrong}")
