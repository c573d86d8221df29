"""The sandboxes of a run whose tasks need none."""

from collections.abc import Mapping

from k25_train.environments.sandboxes.base import SandboxSession, SandboxSpec
from k25_train.errors import MachineError


class NoSandboxes:
    """See `Sandboxes`."""

    @property
    def contained(self) -> Mapping[str, int]:
        """Nothing."""
        return {}

    async def open(self, spec: SandboxSpec) -> SandboxSession:
        """Raises MachineError: a task asks for what it did not say it needs."""
        raise MachineError(
            f"{spec.name}: opens a sandbox, but its task does not say so. Give it needs_sandbox=True."
        )

    async def reconcile(self) -> int:
        """There is nothing to remove."""
        return 0

    async def close(self) -> None:
        """There is nothing to close."""
