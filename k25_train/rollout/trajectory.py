"""What is rolled out, in arrays: the responses of a group, token by token, as the engines returned them.

    group      the K responses to one prompt; it trains when all of them have a verdict
    response   prompt ids, token ids, a log-probability and a version for each token, why it ended, a verdict
    segment    what one request has added to a response; a response of several phases has several

8 bytes for a token, and 4 for its version: 100,000 responses of 16,000 tokens are 19 GB.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25_train.environments.base import Status, Verdict
from k25_train.rollout.engines.base import FinishReason, Generated, VersionSpan


def no_ids() -> np.ndarray:
    """[0] int32."""
    return np.zeros(0, np.int32)


def no_logprobs() -> np.ndarray:
    """[0] float32."""
    return np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What one request has added to a response."""

    round: int
    """Round of rollouts in which it was generated; rounds that come later have higher numbers."""
    prompt_ids: np.ndarray
    """[P] int32: the prompt with every placeholder; the same in each of a response's segments."""
    token_ids: np.ndarray
    """[n] int32: the new tokens."""
    logprobs: np.ndarray
    """[n] float32, nats: of each when it was drawn."""
    spans: tuple[VersionSpan, ...]
    """Which weights made them; positions count from the first of these tokens."""
    finish_reason: FinishReason
    """Why it ended; `aborted` where the response goes on in another round."""

    @classmethod
    def of(cls, generated: Generated, number_of_round: int, finish_reason: FinishReason) -> "Segment":
        """What an engine has returned; `finish_reason` may differ where a round ends before the response."""
        return cls(
            round=number_of_round,
            prompt_ids=np.asarray(generated.prompt_ids, np.int32),
            token_ids=np.asarray(generated.token_ids, np.int32),
            logprobs=np.asarray(generated.logprobs, np.float32),
            spans=generated.spans,
            finish_reason=finish_reason,
        )


@dataclass(slots=True, kw_only=True)
class Response:
    """One response to a prompt, as far as it is."""

    prompt_ids: np.ndarray = field(default_factory=no_ids)
    """[P] int32: the prompt with every placeholder; empty before the first segment."""
    token_ids: np.ndarray = field(default_factory=no_ids)
    """[n] int32: what was generated."""
    logprobs: np.ndarray = field(default_factory=no_logprobs)
    """[n] float32, nats: of each token when it was drawn."""
    versions: np.ndarray = field(default_factory=no_ids)
    """[n] int32: the optimizer step whose weights made each token."""
    num_segments: int = 0
    """Requests that have added to it."""
    last_round: int = -1
    """Round of the latest of them."""
    round_tokens: int = 0
    """Tokens that it has got in that round."""
    finish_reason: FinishReason | None = None
    """Why it ended; None, or `aborted`, while it goes on."""
    verdict: Verdict | None = None
    """What the judge made of it."""

    @property
    def is_finished(self) -> bool:
        """Whether it gets no more tokens."""
        return self.finish_reason in (FinishReason.stop, FinishReason.length)

    @property
    def is_judged(self) -> bool:
        """Whether it has a reward: an unscored verdict is none."""
        return self.verdict is not None and self.verdict.status is not Status.UNSCORED

    def add(self, segment: Segment) -> None:
        """Append what a request has added."""
        versions = np.empty(len(segment.token_ids), np.int32)
        for span in segment.spans:
            versions[span.start : span.stop] = span.version
        self.prompt_ids = segment.prompt_ids
        self.token_ids = np.concatenate([self.token_ids, segment.token_ids])
        self.logprobs = np.concatenate([self.logprobs, segment.logprobs])
        self.versions = np.concatenate([self.versions, versions])
        self.num_segments += 1
        is_same_round = segment.round == self.last_round
        self.round_tokens = len(segment.token_ids) + (self.round_tokens if is_same_round else 0)
        self.last_round = segment.round
        self.finish_reason = segment.finish_reason


@dataclass(slots=True, kw_only=True)
class Group:
    """The K responses to one prompt."""

    number: int
    """Place in the order of tasks over all epochs, from 0: what names a group."""
    task: str
    """Key of its task."""
    epoch: int
    """Which pass over the tasks of its source this is, from 0."""
    version: int
    """Weights that the engines had when it was admitted."""
    stamp: Mapping[str, Any]
    """What was decided for it at admission, as JSON has it, such as Toggle's phase."""
    responses: list[Response]
    """All K of them."""

    @property
    def is_complete(self) -> bool:
        """Whether every response ended and has a reward."""
        return all(response.is_finished and response.is_judged for response in self.responses)

    def rewards(self) -> np.ndarray:
        """[K] float64: the rewards of a complete group. Raises ValueError where one is missing."""
        verdicts = [response.verdict for response in self.responses]
        found = [verdict.reward for verdict in verdicts if verdict and verdict.status is not Status.UNSCORED]
        if len(found) != len(self.responses):
            raise ValueError(f"group {self.number} has {len(found)} rewards of {len(self.responses)}")
        return np.array(found)
