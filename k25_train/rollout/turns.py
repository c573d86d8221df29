"""What a response is made of while it is made: turns of the policy, each behind what it got to see.

    opening ─► turn ─► result of a tool ─► turn ─► …            one branch
                 └───► another history ─► turn ─► …             a fork: it shares what comes before

Everything is token ids. What an engine drew is never encoded again: a history that was rewritten leaves its
branch where the two differ, and goes on in a branch of its own.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from k25_train.errors import RolloutError
from k25_train.rollout.engines.base import FinishReason


class NoRoomError(RolloutError):
    """A prompt is longer than it may be: what is asked is at fault, and no engine."""


class Place(NamedTuple):
    """Where in a response something is put: behind so many tokens of a branch."""

    branch: int
    """Number of the branch, from 0; -1 for none."""
    num_tokens: int
    """Tokens of it that come before, with every placeholder of images."""


ROOT = Place(-1, 0)
"""Behind nothing: a branch of its own from its first token on."""


class Observed(NamedTuple):
    """What the policy gets to see before a turn, and did not draw."""

    token_ids: tuple[int, ...]
    """Ids with one placeholder for each image; they end where the policy begins to generate."""
    media: tuple[bytes, ...] = ()
    """Image files, in the order of their placeholders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the policy said."""

    place: Place
    """The branch that has it, and its tokens by now: where what comes next is put."""
    token_ids: np.ndarray
    """[n] int32: the tokens that were drawn."""
    logprobs: np.ndarray
    """[n] float32, nats: of each when it was drawn."""
    finish_reason: FinishReason
    """Why it ended: `aborted` where it goes on in a later phase, `length` where there is no more room."""


class Turns(Protocol):
    """One response in the making (`session.py`)."""

    async def turn(self, observed: Observed, after: Place, *, max_tokens: int | None = None) -> Turn:
        """Have an engine generate behind what was observed, and record it.

        Args:
            observed: what comes before the new tokens.
            after: where it is put: the end of a branch, a place within one (a fork), or `ROOT`.
            max_tokens: most new tokens; None for all that there is room for.

        Raises `EngineError` if no engine is left, `NoRoomError` for a prompt that is too long, and
        `RolloutError` if none gives a usable answer.
        """
