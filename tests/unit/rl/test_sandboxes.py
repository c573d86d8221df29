"""A run whose tasks need sandboxes asks for one before it costs anything."""

import asyncio

import pytest

from k25_train.config.sandbox import SandboxKind
from k25_train.environments.sandboxes.base import SandboxError, SandboxSession, SandboxSpec
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.errors import MachineError
from k25_train.rl.sandboxes import check_sandboxes


class NoDaemon(NoSandboxes):
    async def open(self, spec: SandboxSpec) -> SandboxSession:
        raise SandboxError("docker ps failed with 1; it said: Is the docker daemon running?.")


def test_a_machine_without_what_sandboxes_need_is_told_which_key_asks_for_them() -> None:
    with pytest.raises(MachineError) as raised:
        asyncio.run(check_sandboxes(NoDaemon(), SandboxKind.container))
    assert str(raised.value) == (
        "environment.sandbox.kind=container: no sandbox is to be had here: docker ps failed with 1; it said: "
        "Is the docker daemon running\n"
        "  -> start what it needs, or use another kind, or tasks without sandboxes"
    )
