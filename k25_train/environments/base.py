"""A task, a response to it, and the verdict on it: what environments, engines and judges agree on.

A verdict is one of three, and never anything between them:

    scored     the judge judged: the reward is its number, 0 included
    failed     the response is at fault and cannot be judged (empty, no answer in it, a malformed tool call):
               the reward is 0, with the reason, and it counts as any other response
    unscored   the judge is at fault (it raised, timed out, its engine answered 500): there is no reward, but
               NaN in its place; the response is judged again, or its group is dropped with a record
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

ACCURACY = "accuracy"
"""Part of a verdict: what the rules that check the answer gave, before budgets and rubrics; 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt, and how a response to it is judged."""

    key: str
    """Unique name within the run, the same whenever the task is made again."""
    family: str
    """What kind of task it is, such as `sums`: figures are reported by it."""
    messages: tuple[Mapping[str, Any], ...]
    """Prompt, as a conversation has it (`data/chat/messages.py`); the last one is not the assistant's."""
    media: tuple[bytes, ...] = ()
    """Image files, one for each image part of the messages, in reading order."""
    reference: Any = None
    """What the judge compares with, as JSON has it: each judge says what it needs."""
    judge: str
    """Name of the judge; empty where its environment judges by itself, as other systems' do."""
    problem: str = ""
    """What tasks of equal difficulty have in common, which share a budget of tokens (`rl/toggle.py`); empty
    for a task that is alone."""
    thinking: bool = False
    """Whether the prompt ends with an open thought, so that a response begins with reasoning."""
    environment: str = "one_turn"
    """Name of what the policy acts in (`registry.py`)."""
    setup: Mapping[str, Any] = field(default_factory=dict)
    """What that environment reads, as JSON has it: tools, files, limits."""
    max_turns: int | None = None
    """Turns that the policy gets; None for as many as `rollout.manager.max_turns` allows."""
    agent: tuple[str, ...] = ()
    """Command of an agent that acts instead of our loop, through the gateway; none for our loop."""
    instructions: tuple[Mapping[str, Any], ...] = ()
    """What the prompt asks of the form of the answer, and is checked with it (`instructions`)."""
    needs_sandbox: bool = False
    """Whether its environment opens a sandbox, of which there are only so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What the model generated for a task, whole."""

    text: str
    """The last turn as text, special tokens by name. What the prompt ends with, such as `<think>`, is not in
    it."""
    num_tokens: int
    """Number of generated tokens in all turns, the final one included."""
    ended: bool
    """Whether the model ended it; False where it reached its limit of tokens."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The whole conversation, where it has more than one turn."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What the policy has left in its sandbox: path below /work -> content."""


class Status(StrEnum):
    """What a verdict amounts to; see the head of this file."""

    SCORED = "scored"
    FAILED = "failed"
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge makes of one response."""

    status: Status
    """Whether there is a reward, and whose fault it is if not."""
    reward: float
    """Reward; 0 where the response failed, NaN where it is unscored."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward is made of, by name, for the log; finite."""
    reason: str = ""
    """Why it failed or is unscored, or what was unusual: its kind, a colon, and what it was; empty for
    nothing to say."""

    def __post_init__(self) -> None:
        """Raises ValueError for a reward that does not go with the status: a fault of the judge's code."""
        if self.status is Status.UNSCORED:
            if not math.isnan(self.reward):
                raise ValueError(
                    f"an unscored verdict has the reward {self.reward}; it has none, which is NaN"
                )
        elif not math.isfinite(self.reward):
            raise ValueError(f"a {self.status} verdict has the reward {self.reward}; it has to be finite")
        if self.status is Status.FAILED and self.reward != 0:
            raise ValueError(f"a failed verdict has the reward {self.reward}; it has to be 0")
        if self.status is not Status.SCORED and not self.reason:
            raise ValueError(f"a {self.status} verdict needs a reason")
        wrong = [name for name, value in self.parts.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"parts of a verdict are not finite: {', '.join(wrong)}")

    @property
    def accuracy(self) -> float:
        """What the answer itself is worth, 0 to 1: Toggle's gate. The reward, where no part says so."""
        return self.parts.get(ACCURACY, self.reward)

    @property
    def kind(self) -> str:
        """What reasons are counted by: the reason up to its colon."""
        return self.reason.partition(":")[0]

    def as_json(self) -> dict[str, Any]:
        """Plain values for a journal; the reward of an unscored verdict is null."""
        reward = None if self.status is Status.UNSCORED else self.reward
        return {
            "status": str(self.status),
            "reward": reward,
            "parts": dict(self.parts),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Verdict":
        """What `as_json` wrote. Raises ValueError or KeyError for anything else."""
        reward = values["reward"]
        return cls(
            status=Status(values["status"]),
            reward=math.nan if reward is None else float(reward),
            parts={name: float(value) for name, value in values["parts"].items()},
            reason=values["reason"],
        )


def scored(reward: float, parts: Mapping[str, float], reason: str = "") -> Verdict:
    """A response that was judged."""
    return Verdict(status=Status.SCORED, reward=reward, parts=parts, reason=reason)


def failed(reason: str, parts: Mapping[str, float] | None = None) -> Verdict:
    """A response that cannot be judged by its own fault: reward 0."""
    return Verdict(status=Status.FAILED, reward=0.0, parts=parts or {}, reason=reason)


def unscored(reason: str) -> Verdict:
    """A response that the judge could not judge: no reward."""
    return Verdict(status=Status.UNSCORED, reward=math.nan, reason=reason)


class Judge(Protocol):
    """Makes a verdict of a response; `k25_train/rl/rewards` has them."""

    @property
    def name(self) -> str:
        """By which tasks ask for it."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        """The verdict. What it raises, and a deadline that it misses, is `unscored`: the caller says so."""
