"""Shards as processes of this machine."""

import asyncio
import os
import subprocess
import sys
import time

POLL_S = 0.05
"""Between two looks at a process that ends. Our choice."""


class ProcessStarter:
    """See `Starter`."""

    def __init__(self, address: str) -> None:
        """`address`: to which shards connect."""
        self._address = address
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    async def start(self, shard: int, incarnation: int, name: str) -> None:
        """See `Starter`."""
        # A process of the main thread's: the kernel's signal comes when the thread ends that started it.
        command = [sys.executable, "-m", "k25_train.rollout.shards.shard"]
        self._processes[shard] = subprocess.Popen(
            [*command, self._address, name, str(incarnation), str(os.getpid())], stdin=subprocess.DEVNULL
        )

    def is_dead(self, shard: int) -> str:
        """See `Starter`."""
        process = self._processes.get(shard)
        if process is None:
            return "it was not started"
        status = process.poll()
        return "" if status is None else f"exit status {status}"

    def pid(self, shard: int) -> int:
        """The process that is a shard now."""
        return self._processes[shard].pid

    async def end(self, shard: int, within_s: float) -> None:
        """See `Starter`."""
        process = self._processes.pop(shard, None)
        if process is None:
            return
        limit = time.monotonic() + within_s
        while process.poll() is None and time.monotonic() < limit:
            await asyncio.sleep(POLL_S)
        process.kill()
        process.wait()
