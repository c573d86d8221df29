"""Before anything is built: all ranks are of one job, see one run folder, and rank 0 holds it.

Ranks talk through the job's store, not through collectives, so that the one that disagrees can be named. Rank
0 collects what each says, decides, and tells all: they raise the same error.
"""

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.joining.environment import RankEnvironment
from k25_train.joining.network import own_name
from k25_train.run_folder import location
from k25_train.run_folder.agreement import Statement, disagreement, not_shared
from k25_train.run_folder.held import HeldFolder, hold
from k25_train.run_folder.jobs import job_state
from k25_train.run_folder.record import LockedError

REMEDIES = {
    "run.dir": "give the same absolute path on every node, on a file system that all of them share",
    "versions": "install the same versions on every node",
}
"""Facts that are compared -> what to do where they differ."""
READ_S = 10.0
"""Longest time that rank 0 waits for the others to have read an error."""


class NoClaim:
    """The claim of who does not write to the run folder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def holder_id(self) -> str:
        """What the lock says; empty without one."""
        return ""

    @property
    def is_lost(self) -> bool:
        """Whether `check` is about to fail."""
        return False

    def check(self) -> None:
        """Raise `LockedError` if the folder is no longer this run's; asked of rank 0 before it writes."""

    def close(self) -> None:
        """Release the folder."""


class FolderClaim(NoClaim):
    """The claim of rank 0."""

    def __init__(self, held: HeldFolder) -> None:
        self.held = held

    @property
    def holder_id(self) -> str:
        return self.held.holder.id

    @property
    def is_lost(self) -> bool:
        return self.held.is_lost

    def check(self) -> None:
        self.held.check()

    def close(self) -> None:
        self.held.close()


class Council:
    """The ranks of a job, of which the first decides for all."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """`store` is for this purpose alone; its time limit is the longest time to wait for a rank."""
        self.store = store
        self.rank = rank
        self.world_size = world_size

    def tell(self, topic: str, value: object) -> list[Any]:
        """Say something; rank 0 gets what all said, by rank, the others nothing."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        self.store.wait(keys)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def decide(self, topic: str, answer: object, error: K25Error | None) -> Any:
        """Rank 0 gives an answer or an error; every rank gets the answer, or raises the error."""
        if not self.rank:
            kind = None if error is None else type(error).__name__
            self.store.set(topic, json.dumps([answer, kind, str(error)]))
        answer, kind, text = json.loads(self.store.get(topic))
        if kind is not None:
            self._all_have_read(topic)
            failure = LockedError(text) if kind == LockedError.__name__ else ConfigError(text)
            failure.is_shared = True
            raise failure
        return answer

    def _all_have_read(self, topic: str) -> None:
        """Have rank 0 wait until all have the error: the store may be its own, and ends with it."""
        if self.rank:
            self.store.set(f"{topic}/read/{self.rank}", "")
            return
        keys = [f"{topic}/read/{rank}" for rank in range(1, self.world_size)]
        # A rank that has ended by itself does not answer.
        with contextlib.suppress(dist.DistError):
            self.store.wait(keys, timedelta(seconds=READ_S))


def claim_folder(config: Config, where: RankEnvironment, store: dist.Store) -> NoClaim:
    """Agree on the run folder, and take it; called by every rank.

    Raises, on every rank:
        ConfigError: ranks differ in what has to be the same, the folder cannot be used, or it is not one
            folder on all nodes, which are named.
        LockedError: another run has it.
    """
    run = Path(os.path.abspath(config.run.dir))
    council = Council(dist.PrefixStore("claim", store), where.rank, where.world_size)
    # 1. Are we of one job?
    own = Statement(rank=where.rank, node=where.node, host=own_name(), facts=facts(run))
    said = [Statement(**values) for values in council.tell("statement", asdict(own))]
    # 2. Rank 0 takes the folder; its lock is what the others look for.
    claim, failure = (NoClaim(), None) if where.rank else try_to_take(run, disagreement(said, REMEDIES))
    try:
        holder_id = council.decide("taken", claim.holder_id, failure)
        # 3. Do all see it, and does rank 0 see what each node writes?
        trouble = location.sees_lock(run, holder_id)
        if trouble is None and where.local_rank == 0:
            trouble = location.leave_token(run, holder_id, where.rank)
        troubles = council.tell("trouble", (where.local_rank == 0, trouble))
        council.decide("shared", None, find_unshared(run, holder_id, said, troubles))
    except K25Error:
        claim.close()
        raise
    finally:
        if isinstance(claim, FolderClaim):
            location.remove_tokens(run)
    return claim


def facts(run: Path) -> dict[str, str]:
    """What has to be the same on all ranks: name -> value. Each has its remedy in `REMEDIES`."""
    packages = ("torch", "megatron-core", "numpy")
    versions = [f"{name} {version(name)}" for name in packages]
    return {"run.dir": str(run), "versions": ", ".join([f"Python {platform.python_version()}", *versions])}


def try_to_take(run: Path, reason_not_to: str | None) -> tuple[NoClaim, K25Error | None]:
    """Rank 0 takes the folder, unless there is a reason not to; the claim, or why there is none."""
    if reason_not_to is not None:
        return NoClaim(), ConfigError(reason_not_to)
    job = os.environ.get("SLURM_JOB_ID", "")
    held: HeldFolder | None = None
    try:
        location.make(run)
        held = hold(run, int(job) if job.isdecimal() else None, job_state)
        location.tokens(run, held.holder.id).mkdir()
    except OSError as error:
        if held is not None:
            held.close()
        return NoClaim(), location.unusable(run, error)
    except K25Error as error:
        return NoClaim(), error
    return FolderClaim(held), None


def find_unshared(
    run: Path, holder_id: str, said: Sequence[Statement], troubles: Sequence[tuple[bool, str | None]]
) -> K25Error | None:
    """The error if some node does not see the folder, or rank 0 not what a node wrote; on rank 0.

    Args:
        run: the run folder.
        holder_id: what is to be found there.
        said: who the ranks are; empty on the others, as `troubles` is.
        troubles: [rank] -> whether it wrote for its node, and what it could not.
    """
    places: dict[str, list[str]] = {}
    limit_s = location.LOOK_S
    for statement, (is_writer, trouble) in zip(said, troubles, strict=True):
        if trouble is None and is_writer:
            trouble = location.sees_token(run, holder_id, statement.rank, limit_s)
            # The others have had the time as well.
            limit_s = limit_s if trouble is None else 0.0
        if trouble is not None:
            places.setdefault(trouble, []).append(statement.where)
    return ConfigError(not_shared(str(run), places)) if places else None
