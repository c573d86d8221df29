"""The sandboxes of a run: `environment.sandbox`, as many as `rollout.manager.max_sandboxes` allows."""

from pathlib import Path

from k25_train.config.sandbox import SandboxKind
from k25_train.config.schema import Config
from k25_train.environments.sandboxes.base import SandboxError, Sandboxes, SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.on_demand import OnDemand
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.errors import MachineError

_PER_ROLLOUT = 2
"""An agent's, and a fresh one in which its work is judged: with fewer places rollouts would wait for each
other."""


def sandboxes_of(config: Config, shards: int = 1) -> OnDemand:
    """What environments get, for one of so many shards."""
    environment, rollout = config.environment, config.rollout
    assert environment is not None and rollout is not None
    sandbox = environment.sandbox
    limits = SandboxLimits(
        cpus=sandbox.cpus,
        memory_bytes=sandbox.memory_bytes,
        disk_bytes=sandbox.disk_bytes,
        processes=sandbox.processes,
        output_bytes=sandbox.output_bytes,
        ttl_s=sandbox.ttl_s,
    )
    secret = [config.run.dir, config.checkpoint.dir, config.checkpoint.local_dir]
    folders = [Path(folder) for folder in secret if folder and "://" not in folder]
    return OnDemand(
        lambda: open_sandboxes(
            sandbox.kind.value,
            limits,
            image=sandbox.image or "",
            run=str(config.run.dir),
            most=max(1, rollout.manager.max_sandboxes // shards) * _PER_ROLLOUT,
            secret=folders,
        )
    )


async def check_sandboxes(sandboxes: Sandboxes, kind: SandboxKind) -> None:
    """Open one, before a run costs anything. Raises MachineError where there is none to be had."""
    try:
        session = await sandboxes.open(SandboxSpec(name="check"))
        await session.close()
    except SandboxError as error:
        said = str(error).strip().rstrip("?.")
        raise MachineError(
            f"environment.sandbox.kind={kind.value}: no sandbox is to be had here: {said}\n"
            "  -> start what it needs, or use another kind, or tasks without sandboxes"
        ) from error
