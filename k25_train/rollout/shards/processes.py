"""Shards as processes of this machine."""

import asyncio
import os
import subprocess
import sys

END_S = 10.0
"""Time that a shard gets to end by itself. Our choice."""


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

    async def end(self, shard: int) -> None:
        """See `Starter`."""
        process = self._processes.pop(shard, None)
        if process is None:
            return
        for _ in range(int(END_S * 10)):
            if process.poll() is not None:
                return
            if _ == 10:
                process.terminate()
            await asyncio.sleep(0.1)
        process.kill()
        process.wait()
