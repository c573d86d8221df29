"""A branch of a response: a path of tokens as engines saw it, and the segments that it is made of.

prompt   drawn   observed   drawn   …       12 bytes for a token: its id, a log-probability, a version
─────────────── ────────────────── ──
segment         segment             …       what one request has added; a turn that was interrupted has
                                            several
"""

from dataclasses import dataclass, field

import numpy as np

from k25_train.rollout.engines.base import FinishReason, VersionSpan
from k25_train.rollout.turns import Place

NOT_DRAWN = -1
"""Version of a token that was observed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What one request has added to a response."""

    round: int
    """Round of rollouts in which it was generated; rounds that come later have higher numbers."""
    after: Place
    """Where in the response it is put: the end of a branch, or else a new branch begins."""
    observed_ids: np.ndarray
    """[m] int32: what the policy saw before these tokens, with every placeholder; empty within a turn."""
    media: tuple[str, ...]
    """Digests of the images in it, in the order of their placeholders (`Group.media`)."""
    token_ids: np.ndarray
    """[n] int32: what was drawn."""
    logprobs: np.ndarray
    """[n] float32, nats: of each when it was drawn."""
    spans: tuple[VersionSpan, ...]
    """Which weights made them; positions count from the first of these tokens."""
    finish_reason: FinishReason
    """Why it ended; `aborted` where the turn goes on."""


def no_tokens() -> np.ndarray:
    """[0] int32."""
    return np.zeros(0, np.int32)


@dataclass(slots=True, kw_only=True)
class Branch:
    """A path of tokens, from the prompt on. n tokens."""

    token_ids: np.ndarray = field(default_factory=no_tokens)
    """[n] int32: with every placeholder of images."""
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """[n] float32, nats: of those that were drawn when they were; 0 for others."""
    versions: np.ndarray = field(default_factory=no_tokens)
    """[n] int32: the optimizer step whose weights drew each; `NOT_DRAWN` for those that were observed."""
    media: tuple[str, ...] = ()
    """Digests of its images, in the order of their placeholders."""
    num_shared: int = 0
    """Tokens that it shares with the branch that it has left, which trains them."""

    @property
    def drawn(self) -> np.ndarray:
        """[n] bool: which tokens the policy drew."""
        return self.versions != NOT_DRAWN

    @property
    def own(self) -> np.ndarray:
        """[n] bool: which it drew in this branch."""
        return self.drawn & (np.arange(len(self.versions)) >= self.num_shared)

    def turns(self) -> list[tuple[int, int]]:
        """Start and stop of what each turn drew: something is observed between two."""
        edges = np.flatnonzero(np.diff(self.drawn.astype(np.int8), prepend=0, append=0))
        return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]

    @property
    def prompt_tokens(self) -> int:
        """Tokens in front of the first that was drawn."""
        drawn = self.drawn
        return int(np.argmax(drawn)) if drawn.any() else len(drawn)

    def add(self, segment: Segment) -> None:
        """Append what a request has added."""
        versions = np.full(len(segment.token_ids), NOT_DRAWN, np.int32)
        for span in segment.spans:
            versions[span.start : span.stop] = span.version
        nothing = np.zeros(len(segment.observed_ids), np.float32)
        self.token_ids = np.concatenate([self.token_ids, segment.observed_ids, segment.token_ids])
        self.logprobs = np.concatenate([self.logprobs, nothing, segment.logprobs])
        self.versions = np.concatenate([self.versions, np.full(len(nothing), NOT_DRAWN, np.int32), versions])
        self.media += segment.media

    def fork(self, num_tokens: int, num_media: int) -> "Branch":
        """A branch that shares its first tokens, and the images in them."""
        return Branch(
            token_ids=self.token_ids[:num_tokens].copy(),
            logprobs=self.logprobs[:num_tokens].copy(),
            versions=self.versions[:num_tokens].copy(),
            media=self.media[:num_media],
            num_shared=num_tokens,
        )
