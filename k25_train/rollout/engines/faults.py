"""How an engine can fail its caller: each time named, counted, and raised as `EngineError`."""

from collections import Counter
from enum import StrEnum

from k25_train.rollout.engines.base import EngineError, EngineLostError

MOST_QUOTED = 300
"""Characters of an answer in a message."""


class FaultKind(StrEnum):
    """What was wrong; the name under which it is counted."""

    request = "request"
    """None of the engine: it was asked for what cannot be answered."""
    unreachable = "unreachable"
    """No connection, or one that was closed before the answer was whole."""
    status = "status"
    """An HTTP status that is no answer."""
    timeout = "timeout"
    """No answer within the time limit."""
    malformed = "malformed"
    """No JSON, or none of the agreed form."""
    prompt = "prompt"
    """It answered another prompt than it was asked."""
    tokens = "tokens"
    """Ids outside the vocabulary, or forbidden ones."""
    logprobs = "logprobs"
    """Not one for each token, not finite, or above 0."""
    versions = "versions"
    """Versions that do not cover the tokens, or are not those that were committed."""
    end = "end"
    """A reason to end that the tokens do not bear out."""
    weights = "weights"
    """New weights were not taken, or something else is staged."""


LOST = frozenset({FaultKind.unreachable, FaultKind.versions, FaultKind.weights})
"""Kinds after which the next request would fare no better (`EngineLostError`)."""


class FaultLog:
    """Makes the errors of one engine and counts them."""

    def __init__(self, name: str) -> None:
        """`name`: the engine's, for messages."""
        self.name = name
        self.counts: Counter[str] = Counter()

    def error(self, kind: FaultKind, subject: str, answered: str, remedy: str) -> EngineError:
        """Count a fault and put it into words.

        Args:
            kind: what it is counted as.
            subject: what was asked: a request's key, or a route.
            answered: what the engine did.
            remedy: what to do about it.
        """
        self.counts[kind.value] += 1
        error = EngineLostError if kind in LOST else EngineError
        return error(f"{self.name}: {subject}: {answered}\n  -> {remedy}")

    @staticmethod
    def quoted(text: str | bytes) -> str:
        """The beginning of an answer, on one line."""
        whole = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        line = " ".join(whole.split())
        return line if len(line) <= MOST_QUOTED else f"{line[:MOST_QUOTED]}…"
