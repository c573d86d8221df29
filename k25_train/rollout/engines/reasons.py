"""Why an engine of a pool gets no requests, in words."""

from collections.abc import Sequence

from k25_train.rollout.engines.member import Member

AND_THEN = "; then "
"""Between why an engine was fenced, and why it still is."""


def why(error: Exception, timeout_s: float) -> str:
    """Of a step of an update that did not succeed within so many seconds."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s (rollout.update_timeout_s)"
    return str(error)


def left_none(members: Sequence[Member]) -> str:
    """That none is left, and why, of each."""
    reasons = "; ".join(f"{member.engine.name}: {member.why_fenced}" for member in members)
    return (
        f"no engine is left to generate: {reasons or 'there are none'}. Start them again, and then the "
        "run: it goes on where it was"
    )
