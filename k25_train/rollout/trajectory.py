"""What is rolled out, in arrays: the responses of a group, token by token, as the engines returned them.

    group      the K responses to one prompt; it trains when all of them have a verdict
    response   what came of one rollout: branches, why it ended, a verdict
    branch     a path of tokens from the prompt on: some were drawn, the others observed (prompt, results of
               tools); most responses have one, a rewritten history leaves it in a fork
    segment    what one request has added to a branch; a turn that was interrupted has several

12 bytes for a token: 100,000 responses of 16,000 tokens are 19 GB. A response has another KB.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from k25_train.environments.base import Status, Verdict
from k25_train.rollout.branches import Branch, Segment, no_tokens
from k25_train.rollout.engines.base import FinishReason
from k25_train.rollout.turns import ROOT


class Ended(StrEnum):
    """Why a response gets no more tokens."""

    STOP = "stop"
    """The policy or its environment has ended it."""
    LENGTH = "length"
    """It has as many tokens as it may have."""
    TURNS = "turns"
    """It has as many turns as it may have."""
    TIMEOUT = "timeout"
    """It took longer than it may."""


@dataclass(slots=True, kw_only=True)
class Response:
    """What came of one rollout, as far as it is."""

    branches: list[Branch] = field(default_factory=list)
    """In the order in which they began."""
    num_segments: int = 0
    """Requests that have added to it."""
    last_round: int = -1
    """Round of the latest of them."""
    round_tokens: int = 0
    """Tokens that were drawn in that round."""
    open_branch: int = -1
    """Branch whose turn was interrupted and goes on; -1 for none."""
    num_turns: int = 0
    """Turns that have begun."""
    current: int = -1
    """Branch of the latest segment; -1 for none."""
    num_answers: int = 0
    """Turns to which the record has what the environment said."""
    num_calls: int = 0
    """Calls of tools."""
    num_unread: int = 0
    """Turns whose calls could not be read."""
    attempt: int = 0
    """Times that it has started over."""
    num_failures: int = 0
    """Those in which its environment failed, and was not only lost."""
    ended: Ended | None = None
    """Why it ended; None while it goes on."""
    verdict: Verdict | None = None
    """What the judge made of it."""

    @property
    def is_finished(self) -> bool:
        """Whether it gets no more tokens."""
        return self.ended is not None

    @property
    def is_judged(self) -> bool:
        """Whether it has a reward: an unscored verdict is none."""
        return self.verdict is not None and self.verdict.status is not Status.UNSCORED

    @property
    def prompt_ids(self) -> np.ndarray:
        """[P] int32: what its first branch begins with, in front of the first token that was drawn."""
        return self.branches[0].token_ids[: self.branches[0].prompt_tokens] if self.branches else no_tokens()

    @property
    def token_ids(self) -> np.ndarray:
        """[n] int32: all that was drawn, branch by branch."""
        return np.concatenate([no_tokens(), *(each.token_ids[each.own] for each in self.branches)])

    @property
    def logprobs(self) -> np.ndarray:
        """[n] float32: of the same."""
        nothing = np.zeros(0, np.float32)
        return np.concatenate([nothing, *(each.logprobs[each.own] for each in self.branches)])

    @property
    def versions(self) -> np.ndarray:
        """[n] int32: of the same."""
        return np.concatenate([no_tokens(), *(each.versions[each.own] for each in self.branches)])

    @property
    def last_turn(self) -> np.ndarray:
        """[n] int32: what its latest turn drew; none before the first."""
        turns = self.branches[self.current].turns() if self.branches else []
        return self.branches[self.current].token_ids[slice(*turns[-1])] if turns else no_tokens()

    @property
    def conversation(self) -> np.ndarray:
        """[n] int32: all behind the prompt in the branch of its latest turn, drawn and observed."""
        branch = self.branches[self.current] if self.branches else Branch()
        return branch.token_ids[branch.prompt_tokens :]

    @property
    def num_observed(self) -> int:
        """Tokens that were observed behind the first turn, branches' shared ones once."""
        own = sum(int((~each.drawn[each.num_shared :]).sum()) for each in self.branches)
        return own - len(self.prompt_ids)

    def add(self, segment: Segment, num_media: int = 0) -> None:
        """Take in what a request has added. Raises ValueError for a place that there is not.

        `num_media`: images in front of the place, where it forks.
        """
        number, num_tokens = segment.after
        goes_on = number == self.open_branch and number >= 0 and not len(segment.observed_ids)
        if segment.after == ROOT:
            number = len(self.branches)
            self.branches.append(Branch())
        elif num_tokens > len(self.branches[number].token_ids):
            raise ValueError(f"token {num_tokens} of a branch of {len(self.branches[number].token_ids)}")
        elif num_tokens < len(self.branches[number].token_ids):
            self.branches.append(self.branches[number].fork(num_tokens, num_media))
            number = len(self.branches) - 1
        self.branches[number].add(segment)
        self.num_segments += 1
        self.num_turns += not goes_on
        is_same_round = segment.round == self.last_round
        self.round_tokens = len(segment.token_ids) + (self.round_tokens if is_same_round else 0)
        self.last_round = segment.round
        self.current = number
        if segment.finish_reason is FinishReason.aborted:
            self.open_branch = number
        elif self.open_branch == number:
            self.open_branch = -1

    def answered(self, turn: int, num_calls: int, *, is_unread: bool) -> None:
        """Take in that the environment has said something to a turn, once."""
        if turn >= self.num_answers:
            self.num_answers = turn + 1
            self.num_calls += num_calls
            self.num_unread += is_unread

    def start_over(self, attempt: int, *, has_failed: bool) -> None:
        """Forget what there is: another attempt begins. Its tokens stay in the journal, and do not train."""
        self.branches, self.open_branch, self.current = [], -1, -1
        self.num_turns = self.num_answers = self.num_calls = self.num_unread = 0
        self.attempt, self.ended = attempt, None
        self.num_failures += has_failed


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
    media: dict[str, bytes] = field(default_factory=dict)
    """Digest -> image file that a response has seen; each once for all of them."""

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
