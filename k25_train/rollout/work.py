"""A response that is to be made, and who makes it: between a trainer's loop and event loops anywhere.

controller ─► Work ─► Rollouts (this loop, processes, Ray) ─► records, one by one ─► the journal
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from k25_train.environments.base import Task
from k25_train.rollout.manager.snapshot import Snapshot
from k25_train.rollout.records import Record
from k25_train.rollout.trajectory import Response

Append = Callable[[Record], None]
"""Takes the records of a response in, in order, on the caller's event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How far a response may get now."""

    number: int
    """Of the round, over the run."""
    cap: int | None = None
    """Tokens that a response may get in it; None for all it may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One response that is to be gone on with."""

    task: Task
    """What is asked."""
    group: int
    """Number of its group: lower ones are older, and go first."""
    sample: int
    """Its place in the group."""
    seed: int
    """What its draws depend on, with turn and position."""
    source: str
    """Source of the task: between sources it is fair."""
    allowed: Round
    """How far it may get now."""
    response: Response
    """What there is of it. Whoever appends the records extends it; the worker has a copy, or the same."""
    media: dict[str, bytes]
    """Digest -> image that its group has seen; extended likewise."""


class Rollouts(Protocol):
    """Makes responses, any number at once."""

    async def respond(self, work: Work, append: Append) -> None:
        """Have a response go on until it has ended and has a verdict, or has what the round allows.

        `append` is given every record (`journal_state.py`) on the caller's event loop, in order. Raises
        `RolloutError` with the task's name where it has to be given up, `EngineError` if no engine is left.
        """

    async def announce(self, version: int) -> None:
        """The engines have other weights: those of this version."""

    async def snapshot(self) -> Snapshot:
        """How its rollouts are, as of some seconds ago at most."""

    async def close(self) -> None:
        """End everything, within a time."""
