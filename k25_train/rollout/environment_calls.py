"""Calls of environments: whatever one raises is its own fault, named, and never the policy's."""

import asyncio
from collections.abc import Awaitable

from k25_train.environments.environment import EnvironmentFaultError
from k25_train.environments.sandboxes.base import SandboxError
from k25_train.errors import K25Error, RolloutError
from k25_train.rollout.engines.base import EngineError


class LostError(K25Error):
    """An environment cannot go on where it was: what had it was killed, or it answers otherwise than it did.
    Nobody's fault: another attempt begins, and it does not count as a failure."""


async def asked[T](what: str, call: Awaitable[T], limit_s: float) -> T:
    """What a method of an environment returns.

    Args:
        what: it is asked for, for messages.
        call: of the method.
        limit_s: seconds that it may take.

    Raises `EnvironmentFaultError` for whatever it raises, a missed limit included, but errors of engines, of
    sandboxes and those that end the run.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await call
    except (EngineError, RolloutError, SandboxError, EnvironmentFaultError):
        raise
    except Exception as error:
        raise EnvironmentFaultError(f"{what} failed: {type(error).__name__}: {error}") from error
