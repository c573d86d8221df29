"""Several engines as one: requests go to the one with the least to do, new weights to all of them at once.

    update:  stage ─► stage ─► stage      every engine has the new weights next to the old
                      │  one fails: it is fenced off, the others go on
             pause ─► pause ─► pause      between two tokens
             commit ► commit ► commit     none generates before all of them are of one version
             resume ► resume ► resume

An engine that has missed an update, or is not to be had, is fenced: it gets no request until it has been
brought to the version of the others (`rebuild`), so tokens are never those of weights that nobody knows of,
and a dead engine, which has the least to do, is no hole into which all requests fall. Source: posttrain
practice of checkpoint-engine and vLLM's four phases; two-phase with fencing is our choice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import (
    Engine,
    EngineError,
    EngineLostError,
    EngineState,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
)
from k25_train.rollout.engines.busy_clock import busy_share
from k25_train.rollout.engines.member import Member
from k25_train.rollout.engines.reasons import AND_THEN, left_none, why
from k25_train.rollout.engines.routing import Routes, chosen

Weights = Path | Sequence[NamedTensor]
"""A folder of safetensors, or tensors that several engines may read."""


@dataclass(slots=True)
class EnginePool:
    """Engines of one policy. All methods are for one event loop."""

    members: list[Member]
    """Fenced ones included."""
    timeout_s: float
    """Of every step of an update, per engine."""
    version: int = -1
    """Of the weights that all engines sample from; -1 before the first update."""
    staged: Weights | None = None
    """What `version` was made from, for engines that come back."""
    follows: bool = False
    """Whether somebody else gives the engines their weights, and says so (`follow`)."""
    routes: Routes = field(default_factory=Routes)
    """Which engine has whose cache."""
    told: list[str] = field(default_factory=list)
    """What has happened to engines and was not taken yet (`take_events`)."""

    @classmethod
    def of(cls, engines: Sequence[Engine], timeout_s: float) -> "EnginePool":
        """A pool of engines that have no weights yet."""
        return cls([Member(engine) for engine in engines], timeout_s)

    @property
    def serving(self) -> list[Member]:
        """Engines that get requests."""
        return [member for member in self.members if not member.why_fenced]

    @property
    def num_serving(self) -> int:
        """Engines that get requests."""
        return len(self.serving)

    async def generate(self, request: Request) -> Generated:
        """Generate where the response's earlier turns were, or with the fewest requests (`routing.py`).

        Raises `EngineError` as it does, if there is none, and for one that was fenced off meanwhile. One that
        is lost (`EngineLostError`) is fenced off.
        """
        self._some()
        member = chosen(self.routes, request.key, self.members)
        member.running += 1
        before, fences = self.version, member.fences
        try:
            generated = await member.engine.generate(request)
        except EngineError as error:
            member.failures += 1
            # Later, it is another engine than the one that was asked: it has been rebuilt.
            if isinstance(error, EngineLostError) and member.fences == fences:
                self.fence(member.engine.name, str(error))
            raise
        finally:
            member.running -= 1
        if member.fences != fences:
            # Since it was asked: whatever label its tokens have, nobody knows its weights.
            cause = member.why_fenced or "it has been rebuilt since"
            raise EngineError(f"{member.engine.name}: fenced off while it generated: {cause}")
        # Who gives them may be a little ahead of who says so.
        newest = (
            max(self.version, *(span.version for span in generated.spans)) if self.follows else self.version
        )
        others = [span.version for span in generated.spans if not before <= span.version <= newest]
        if others:
            # Its label, or its weights: neither can be trained on, and the next answer would be no better.
            cause = f"it generates with version {others[0]} where {before} is due"
            self.fence(member.engine.name, cause)
            raise EngineError(f"{member.engine.name}: {cause}")
        member.failures = 0
        return generated

    def follow(self, version: int) -> None:
        """Somebody else has given all engines that are any good the weights of a version; fenced ones may be
        good again."""
        self.version = version
        for member in self.members:
            member.why_fenced, member.failures = "", 0

    async def resume(self) -> None:
        """Have every engine generate again. Fences as `update` does."""
        await self._on_all("resume", lambda engine: engine.resume())

    async def update(self, weights: Weights, version: int) -> None:
        """Bring every engine to `version`, all at one point between two tokens.

        Those that fail are fenced. Raises `EngineError` naming all of them if none is left; then none samples
        from the new weights.
        """
        await self._on_all("stage", lambda engine: engine.stage(weights, version))
        await self._on_all("pause", lambda engine: engine.pause(PauseMode.keep))
        await self._on_all("commit", lambda engine: engine.commit(version))
        self._have(version, weights)
        await self._on_all("resume", lambda engine: engine.resume())

    async def update_by(self, send: Callable[[], None], version: int) -> None:
        """Bring every engine to `version`, which `send` loads into all of them while they are paused.

        Raises as `update`, and what `send` does; then engines stay paused, with weights that nobody knows.
        """
        await self.pause()
        await asyncio.to_thread(send)
        await self.adopt(version)

    async def pause(self) -> None:
        """Stop all engines between two tokens."""
        await self._on_all("pause", lambda engine: engine.pause(PauseMode.keep))

    async def adopt(self, version: int) -> None:
        """Go on with weights that have come to all engines by another way (`Engine.adopt`)."""
        await self._on_all("adopt", lambda engine: engine.adopt(version))
        # Who missed this cannot be brought back: there is nothing to stage.
        self._have(version, None)
        await self._on_all("resume", lambda engine: engine.resume())

    async def rebuild(self) -> None:
        """Bring fenced engines to the version of the others; those that fail again stay fenced."""
        if self.staged is None:
            return
        weights, version = self.staged, self.version
        for member in self.members:
            if not member.why_fenced:
                continue
            engine, cause = member.engine, member.why_fenced
            try:
                async with asyncio.timeout(self.timeout_s):
                    await engine.stage(weights, version)
                    await engine.pause(PauseMode.abort)
                    await engine.commit(version)
                    await engine.resume()
            except (EngineError, TimeoutError) as error:
                first, _, _ = cause.partition(AND_THEN)
                member.why_fenced = f"{first}{AND_THEN}{why(error, self.timeout_s)}"
            else:
                member.why_fenced, member.failures = "", 0
                self.told.append(f"{engine.name} serves version {version} again; it was fenced off: {cause}")

    async def probe(self, sequences: Sequence[ProbeSequence]) -> dict[str, list[np.ndarray]]:
        """Name of each serving engine -> log-probabilities of the sequences (`Engine.probe`)."""
        found: dict[str, list[np.ndarray]] = {}

        async def ask(engine: Engine) -> None:
            found[engine.name] = await engine.probe(sequences)

        await self._on_all("probe", ask)
        return found

    def fence(self, name: str, cause: str) -> None:
        """Give an engine no more requests. Raises `EngineError` if it was the last one."""
        for member in self.members:
            if member.engine.name == name and not member.why_fenced:
                self.told.append(member.fence(cause))
        self._some()

    async def states(self) -> dict[str, EngineState]:
        """Name of each serving engine -> how it is."""
        found: dict[str, EngineState] = {}

        async def ask(engine: Engine) -> None:
            found[engine.name] = await engine.state()

        await self._on_all("state", ask)
        for member in self.members:
            if (state := found.get(member.engine.name)) is not None:
                member.use.note(state.busy_share)
        return found

    def take_busy_share(self) -> float:
        """Share of the time since this was last asked in which engines generated, as `states` saw it."""
        return busy_share([member.use for member in self.members])

    def fenced(self) -> dict[str, str]:
        """Name of each engine that gets no requests -> why."""
        return {each.engine.name: each.why_fenced for each in self.members if each.why_fenced}

    def take_events(self) -> list[str]:
        """What has happened to engines since this was asked last."""
        told, self.told = self.told, []
        return told

    async def close(self) -> None:
        """End all engines, fenced ones too."""
        await asyncio.gather(*(member.engine.close() for member in self.members), return_exceptions=True)

    def _have(self, version: int, weights: Weights | None) -> None:
        """Serving engines have a version, made of these weights."""
        self.version, self.staged = version, weights
        for member in self.serving:
            member.failures = 0

    async def _on_all(self, what: str, call: Callable[[Engine], Awaitable[None]]) -> None:
        """The call on every serving engine, at once; those that fail or do not answer in time are fenced."""

        async def one(member: Member) -> None:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await call(member.engine)
            except (EngineError, TimeoutError) as error:
                if not member.why_fenced:
                    self.told.append(member.fence(f"{what} failed: {why(error, self.timeout_s)}"))

        await asyncio.gather(*(one(member) for member in self.serving))
        self._some()

    def _some(self) -> list[Member]:
        if serving := self.serving:
            return serving
        raise EngineError(left_none(self.members))
