"""Instances of Apptainer, as SLURM clusters have it, where users may have no groups and no daemon.

Limits of memory, processors and processes take a group that SLURM or systemd has delegated (version 2);
without one `apptainer` says so and starts nothing. What files may take is `sessiondir max size` of its
configuration. Instances have no time to live of their own: the job that they are in ends them, and
`reconcile`.
"""

import json
import shutil
from collections.abc import Sequence

from k25_train.environments.sandboxes.base import WORK, SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.remote import PREFIX, places
from k25_train.environments.sandboxes.tools import call, checked
from k25_train.errors import MachineError

_START_S = 600.0
"""Seconds to start one: the first pulls and converts the image."""
_CALL_S = 60.0


class Instances:
    """A `Driver`."""

    def __init__(self, image: str) -> None:
        """`image` is a file, or a URL such as `docker://…`."""
        self._image = image

    async def create(self, name: str, spec: SandboxSpec, limits: SandboxLimits) -> None:
        """Create and start what has the name. Raises SandboxError."""
        command = [
            "apptainer", "instance", "start", "--containall", "--no-home", "--cleanenv", "--no-privs",
            "--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes),
            "--cpus", f"{limits.cpus:g}", "--pids-limit", str(limits.processes),
            "--env", f"HOME={WORK}",
        ]  # fmt: skip
        if not spec.network:
            command += ["--net", "--network", "none"]
        for place in places(spec):
            command += ["--scratch", place]
        for within, folder in spec.folders.items():
            command += ["--bind", f"{folder.resolve()}:{within}:ro"]
        await checked([*command, spec.image or self._image, name], timeout_s=_START_S)

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """What runs a command within, with its streams and its status."""
        return ["apptainer", "exec", "--cleanenv", f"instance://{name}", *command]

    async def remove(self, name: str) -> None:
        """Remove it with all that is in it; nothing where it is gone. Raises SandboxError."""
        command = ["apptainer", "instance", "stop", "--force", name]
        done = await call(command, timeout_s=_CALL_S)
        if done.status and name in await self.names():
            await checked(command, timeout_s=_CALL_S)

    async def names(self) -> list[str]:
        """All that begin with `PREFIX`, of every owner, running or not. Raises SandboxError."""
        listed = json.loads(await checked(["apptainer", "instance", "list", "--json"], timeout_s=_CALL_S))
        names = [str(instance["instance"]) for instance in listed.get("instances") or []]
        return [name for name in names if name.startswith(PREFIX)]

    async def is_alive(self, name: str) -> bool:
        """Whether it runs. Raises SandboxError where this cannot be said."""
        return name in await self.names()


def open_instances(image: str) -> Instances:
    """The driver. Raises MachineError without Apptainer."""
    if not shutil.which("apptainer"):
        raise MachineError(
            "environment.sandbox.kind=apptainer needs Apptainer, and this machine has none. Load its module "
            "(`module load apptainer`), or use kind=bubblewrap."
        )
    return Instances(image)
