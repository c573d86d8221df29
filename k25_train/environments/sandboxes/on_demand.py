"""Sandboxes of a run: once the first is needed, the machine is asked for them, and forgotten ones go."""

import asyncio
from collections.abc import Callable, Mapping

from k25_train.environments.sandboxes.base import Sandboxes, SandboxSession, SandboxSpec


class OnDemand:
    """`Sandboxes` that are made when the first is opened, so that runs without any need nothing for them."""

    def __init__(self, make: Callable[[], Sandboxes]) -> None:
        """`make` may raise MachineError, which `open` passes on."""
        self._make = make
        self._made: Sandboxes | None = None
        self._lock = asyncio.Lock()

    @property
    def contained(self) -> Mapping[str, int]:
        """How often which limit has held, by cause."""
        return self._made.contained if self._made else {}

    async def open(self, spec: SandboxSpec) -> SandboxSession:
        """A new one. Waits while there are as many as there may be. Raises MachineError, SandboxError."""
        sandboxes = await self._all()
        return await sandboxes.open(spec)

    async def reconcile(self) -> int:
        """Remove those whose owner is gone, or whose time is over; returns how many these were."""
        sandboxes = await self._all()
        return await sandboxes.reconcile()

    async def _all(self) -> Sandboxes:
        async with self._lock:
            if self._made is None:
                made = self._make()
                await made.reconcile()
                self._made = made
        return self._made

    async def close(self) -> None:
        """Close all that are open."""
        if self._made:
            await self._made.close()
