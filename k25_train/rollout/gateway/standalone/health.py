"""Which engines of a standalone gateway get requests: those that answer, with the weights that it serves."""

import asyncio
from collections.abc import Mapping

from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.engines.member import Member
from k25_train.rollout.engines.pool import EnginePool


def reasons(found: Mapping[str, int | str], served: int | None) -> tuple[dict[str, str], int | None]:
    """Name of each engine that gets none -> why, and the version of those that do.

    Args:
        found: name of each engine -> version of its weights, or why it does not answer.
        served: version that is served; None for the newest there is, and where none answers.
    """
    versions = [each for each in found.values() if isinstance(each, int)]
    version = max(versions, default=None) if served is None else served
    told: dict[str, str] = {}
    for name, each in found.items():
        if isinstance(each, str):
            told[name] = each
        elif each != version:
            told[name] = f"its weights are of version {each}, where version {version} is served"
    return told, version


class Health:
    """Looks at the engines of a pool again and again, and fences off or takes back."""

    def __init__(self, pool: EnginePool, seconds: float) -> None:
        """`seconds`: that an engine has to answer, and between two looks."""
        self._pool, self._seconds = pool, seconds
        self._served: int | None = None

    @property
    def version(self) -> int | None:
        """Of the weights that are served; None before an engine has answered."""
        return self._served

    async def look(self) -> list[str]:
        """Look at each engine once; what has changed."""
        members = self._pool.members
        answers = await asyncio.gather(*(self._version_of(member) for member in members))
        found = {member.engine.name: answer for member, answer in zip(members, answers, strict=True)}
        told, self._served = reasons(found, self._served)
        if self._served is not None:
            self._pool.version = self._served
        changed = []
        for member in members:
            why = told.get(member.engine.name, "")
            if why and not member.why_fenced:
                changed.append(member.fence(why))
            elif not why and member.why_fenced:
                changed.append(f"{member.engine.name} serves again; it was fenced off: {member.why_fenced}")
                member.why_fenced, member.failures = "", 0
        return changed

    async def _version_of(self, member: Member) -> int | str:
        try:
            async with asyncio.timeout(self._seconds):
                return (await member.engine.state()).version
        except TimeoutError:
            return f"it does not say how it is within {self._seconds:g} s"
        except EngineError as error:
            return str(error)
