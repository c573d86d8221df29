"""Containers of podman or docker.

They remove themselves when their first process ends, which sleeps for their time to live; `--rm` does not
hold where the machine goes down, so that they are found by their names, too.
"""

import shutil
from collections.abc import Sequence

from k25_train.environments.sandboxes.base import WORK, SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.remote import PREFIX, places
from k25_train.environments.sandboxes.tools import call, checked
from k25_train.errors import MachineError

_CREATE_S = 600.0
"""Seconds to create one: the first pulls the image."""
_CALL_S = 60.0
_LABEL = "k25-sandbox"


class Containers:
    """A `Driver`."""

    def __init__(self, program: str, image: str) -> None:
        """`program` is podman or docker."""
        self._program = program
        self._image = image

    async def create(self, name: str, spec: SandboxSpec, limits: SandboxLimits) -> None:
        """Create and start what has the name. Raises SandboxError."""
        room = f"rw,exec,nosuid,nodev,size={limits.disk_bytes},mode=1777"
        command = [
            self._program, "run", "--detach", "--rm", "--init", "--name", name, "--label", _LABEL,
            "--network", "bridge" if spec.network else "none", "--hostname", "sandbox",
            "--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes),
            "--cpus", f"{limits.cpus:g}", "--pids-limit", str(limits.processes), "--ulimit", "core=0",
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534",
            "--read-only", "--shm-size", str(limits.disk_bytes), "--workdir", WORK, "--env", f"HOME={WORK}",
        ]  # fmt: skip
        for place in places(spec):
            command += ["--tmpfs", f"{place}:{room}"]
        for within, folder in spec.folders.items():
            command += ["--volume", f"{folder.resolve()}:{within}:ro"]
        image = spec.image or self._image
        await checked([*command, image, "sleep", str(int(limits.ttl_s) + 1)], timeout_s=_CREATE_S)

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """What runs a command within, with its streams and its status."""
        return [self._program, "exec", "--interactive", name, *command]

    async def remove(self, name: str) -> None:
        """Remove it with all that is in it; nothing where it is gone. Raises SandboxError."""
        done = await call([self._program, "rm", "--force", "--volumes", name], timeout_s=_CALL_S)
        if done.status and name in await self.names():
            await checked([self._program, "rm", "--force", "--volumes", name], timeout_s=_CALL_S)

    async def names(self) -> list[str]:
        """All that begin with `PREFIX`, of every owner, running or not. Raises SandboxError."""
        return await self._listed("--all")

    async def is_alive(self, name: str) -> bool:
        """Whether it runs. Raises SandboxError where this cannot be said."""
        return name in await self._listed()

    async def _listed(self, *options: str) -> list[str]:
        command = [self._program, "ps", *options, "--filter", f"label={_LABEL}", "--format", "{{.Names}}"]
        lines = (await checked(command, timeout_s=_CALL_S)).decode().split()
        return [line for line in lines if line.startswith(PREFIX)]


def open_containers(image: str) -> Containers:
    """The driver of podman, or of docker where there is none. Raises MachineError without either."""
    for program in ("podman", "docker"):
        if shutil.which(program):
            return Containers(program, image)
    raise MachineError(
        "environment.sandbox.kind=container needs podman or docker, and this machine has neither. Install "
        "one (`apt-get install podman`), or use kind=bubblewrap."
    )
