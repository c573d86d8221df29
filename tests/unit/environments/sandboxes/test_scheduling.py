"""Whatever priority a process has, what it starts in sandboxes has that of any program."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from k25_train.environments.sandboxes.base import SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.one_shot import open_sandbox
from k25_train.environments.sandboxes.opening import open_sandboxes
from tests.helpers.sandboxes import LIMITS, needs_bubblewrap

pytestmark = needs_bubblewrap
POLICY = "sed 's/.*) //' /proc/self/stat | cut -d' ' -f39"
"""Field 41 of the whole line."""


def once() -> bytes:
    """Of a sandbox for one command."""
    return asyncio.run(open_sandbox(LIMITS).run(["/bin/sh", "-c", POLICY], {})).stdout


def living() -> bytes:
    """Of one that lives on."""

    async def use() -> bytes:
        limits = SandboxLimits(
            cpus=1.0,
            memory_bytes=96 << 20,
            disk_bytes=8 << 20,
            processes=32,
            output_bytes=1000,
            ttl_s=300.0,
        )
        sandboxes = open_sandboxes("bubblewrap", limits, run="test", most=1, secret=[])
        session = await sandboxes.open(SandboxSpec(name="t"))
        try:
            return (await session.run(["sh", "-c", POLICY], timeout_s=20)).stdout
        finally:
            await session.close()
            await sandboxes.close()

    return asyncio.run(use())


@pytest.mark.parametrize("policy_in", [once, living])
def test_a_real_time_priority_is_not_inherited(policy_in: Callable[[], bytes]) -> None:
    def hurried() -> bytes:
        # Of this thread alone.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        found = policy_in()
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
        return found

    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(hurried).result() == f"{os.SCHED_OTHER}\n".encode()
        except PermissionError:
            pytest.skip("this user may not take a real-time priority")
