"""The place of a process in its job, from the variables that torchrun, or another launcher, sets.

The only reader of these variables: a wrong one is named, and leftovers of another session do no harm to
a process that is alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNSET = f"`unset {' '.join(NAMES)}`"
LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """Who this process is, and where the job meets."""

    rank: int
    world_size: int
    local_rank: int
    """Index among the ranks of this node."""
    local_world_size: int
    """Ranks of this node."""
    node: int
    """Index of the node."""
    address: str
    """Host at which ranks meet; empty if there is one rank."""
    port: int
    """TCP port at which they do; 0 if there is one rank."""
    by_torchrun: bool
    """Whether torchrun started this process, not the user with variables of an earlier session."""
    agent_has_store: bool
    """Whether torchrun keeps the job's store; otherwise rank 0 does."""
    restart: int = 0
    """How often torchrun has started the ranks again (--max-restarts), with the same store."""

    @property
    def is_alone(self) -> bool:
        """Whether the job has no other rank."""
        return self.world_size == 1

    @property
    def is_on_one_node(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.local_world_size == self.world_size

    @property
    def opens_store(self) -> bool:
        """Whether this rank opens the job's store for the others."""
        return self.rank == 0 and not self.is_alone and not self.agent_has_store

    @property
    def origin(self) -> str:
        """What to add to an error about the variables."""
        if self.by_torchrun:
            return ""
        return (
            ". torchrun has not started this process, so the variables may be another session's: "
            f"{UNSET} to run alone, or start the ranks with torchrun or `python -m launch.torchrun`"
        )


def read_environment(environment: Mapping[str, str] = os.environ) -> RankEnvironment:
    """The place of this process; alone, whatever else is set, unless WORLD_SIZE is more than 1.

    Raises `ConfigError` naming the variable, its value, the rule and the remedy.
    """
    world_size = _number(environment, "WORLD_SIZE", "1", 1, None)
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if world_size == 1:
        return RankEnvironment(
            rank=0, world_size=1, local_rank=0, local_world_size=1, node=0, address="", port=0,
            by_torchrun=by_torchrun, agent_has_store=False,
        )  # fmt: skip
    rank = _number(environment, "RANK", None, 0, world_size - 1)
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", "1", 1, world_size)
    address = environment.get("MASTER_ADDR", "").strip()
    if not address:
        raise _wrong(environment, "MASTER_ADDR", "must name the host of rank 0")
    agent_has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK", "0", 0, local_world_size - 1),
        local_world_size=local_world_size,
        node=_number(environment, "GROUP_RANK", str(rank // local_world_size), 0, world_size - 1),
        address=address,
        port=_number(environment, "MASTER_PORT", None, 1, LAST_PORT),
        by_torchrun=by_torchrun,
        agent_has_store=agent_has_store,
        restart=_number(environment, "TORCHELASTIC_RESTART_COUNT", "0", 0, None) if agent_has_store else 0,
    )


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints what every rank of its job has to say: rank 0, or the only one.

    Never raises: it is asked while errors are reported.
    """
    return environment.get("WORLD_SIZE", "1").strip() in ("", "0", "1") or environment.get("RANK", "0") == "0"


def number_of(name: str, default: int) -> int:
    """A variable that counts something, `default` where it is not set. Raises `ConfigError` if it is no
    number."""
    return _number(os.environ, name, str(default), 0, None)


def _number(
    environment: Mapping[str, str], name: str, default: str | None, least: int, most: int | None
) -> int:
    """A variable that counts something; `default` applies where it is not set."""
    text = environment.get(name, default)
    is_number = text is not None and text.strip().isascii() and text.strip().isdecimal()
    value = int(text) if is_number and text is not None else -1
    if is_number and value >= least and (most is None or value <= most):
        return value
    limits = f"of at least {least}" if most is None else f"within {least} to {most}"
    raise _wrong(environment, name, f"must be a whole number {limits}")


def _wrong(environment: Mapping[str, str], name: str, rule: str) -> ConfigError:
    given = repr(environment[name]) if name in environment else "not set"
    world_size = environment.get("WORLD_SIZE", "1")
    return ConfigError(
        f"environment variable {name} is {given}, with WORLD_SIZE={world_size!r}: it {rule}. Launchers set "
        f"it: {UNSET} to run alone, or start the ranks with torchrun"
    )
