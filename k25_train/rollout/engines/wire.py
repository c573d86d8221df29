"""What differs between servers: the form of requests and answers; and what bounds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from k25_train.config.rollout import RolloutConfig
from k25_train.rollout.engines.base import PauseMode, ProbeSequence, Request
from k25_train.rollout.engines.checks import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What bounds the requests to one engine."""

    request_s: float
    """Seconds for a response, pauses not counted."""
    update_s: float
    """Seconds for a pause, an update or a probe."""
    max_running: int
    """Responses on the way at once."""
    attempts: int
    """Tries of a request that fails on the way or with a status that may pass."""

    @classmethod
    def of(cls, rollout: RolloutConfig) -> "HttpLimits":
        """As configured."""
        return cls(
            request_s=rollout.request_timeout_s,
            update_s=rollout.update_timeout_s,
            max_running=rollout.max_running,
            attempts=rollout.max_attempts,
        )


class Counted(NamedTuple):
    """What a server says of itself."""

    version: int
    """Of its weights."""
    running: int
    """Requests that it generates."""
    waiting: int
    """Requests that wait in it."""
    kv_use: float
    """Share of its keys and values in use, 0 to 1."""


class Wire(Protocol):
    """What requests and answers of one kind of server look like. Methods raise `EngineError`."""

    async def prepare(self) -> int:
        """See whether it can do what it will be asked for; returns the version of its weights."""

    async def generate(self, request: Request) -> Answer:
        """Ask for a response; the caller has the time limit."""

    async def pause(self, mode: PauseMode) -> None:
        """Stop between two tokens."""

    async def resume(self) -> None:
        """Go on."""

    async def load(self, folder: Path, version: int) -> None:
        """Take weights and label, and forget all keys that others made. It is paused."""

    async def adopt(self, version: int) -> None:
        """Take a label for weights that are there already, and forget all keys that others made."""

    async def probe(self, sequence: ProbeSequence, subject: str) -> tuple[list[int], list[float]]:
        """Ids with all placeholders, and the log-probability of each but the first."""

    async def counts(self) -> Counted:
        """How much it has to do."""
