"""The run folder before anything is built: all ranks see one folder, and rank 0 holds it."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.joining.council import Council
from k25_train.joining.environment import RankEnvironment
from k25_train.joining.network import own_name
from k25_train.joining.words import Member, some_of
from k25_train.run_folder import location
from k25_train.run_folder.checkpoints import bind
from k25_train.run_folder.held import HeldFolder, hold
from k25_train.run_folder.jobs import job_state


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


def claim_folder(config: Config, where: RankEnvironment, store: dist.Store) -> NoClaim:
    """Agree on the run folder, and take it; called by every rank.

    Raises, on every rank:
        ConfigError: the folder cannot be used; or it, or a folder in it, is not one on all nodes, which are
            named.
        LockedError: another run has it.
    """
    run = Path(os.path.abspath(config.run.dir))
    council = Council(dist.PrefixStore("claim", store), where.rank, where.world_size)
    # 1. Rank 0 takes the folder; its lock is what the others look for.
    claim, failure = (
        (NoClaim(), None)
        if where.rank
        else try_to_take(run, config.checkpoint.dir, is_shared=not where.is_on_one_node)
    )
    # One node shares with itself whatever there is.
    folders = (
        location.shared_folders(run) if isinstance(claim, FolderClaim) and not where.is_on_one_node else []
    )
    try:
        holder_id, folders = council.decide("taken", (claim.holder_id, folders), failure)
        # 2. Do all see it, and does rank 0 see what each node writes?
        trouble = location.sees_lock(run, holder_id)
        if trouble is None and where.local_rank == 0:
            trouble = location.exchange_tokens(run, folders, holder_id, where.rank)
        own = Member(rank=where.rank, node=where.node, host=own_name())
        said = council.tell("seeing the run folder", (asdict(own), where.local_rank == 0, trouble))
        council.decide("shared", None, find_unshared(run, folders, holder_id, said))
    except K25Error:
        claim.close()
        raise
    finally:
        if isinstance(claim, FolderClaim):
            location.remove_tokens(run)
    return claim


def try_to_take(run: Path, checkpoint_dir: str | None, *, is_shared: bool) -> tuple[NoClaim, K25Error | None]:
    """Rank 0 takes the folder, has it lead to `checkpoint.dir`, and leaves its tokens where it is shared; the
    claim, or why there is none."""
    job = os.environ.get("SLURM_JOB_ID", "")
    held: HeldFolder | None = None
    try:
        location.make(run)
        held = hold(run, int(job) if job.isdecimal() else None, job_state)
        bind(run, checkpoint_dir)
        for name in location.shared_folders(run) if is_shared else []:
            location.make_tokens(run / name, held.holder.id, rank=0)
    except OSError as error:
        if held is not None:
            held.close()
        return NoClaim(), location.unusable(run, error)
    except K25Error as error:
        if held is not None:
            held.close()
        return NoClaim(), error
    return FolderClaim(held), None


def find_unshared(
    run: Path, folders: Sequence[str], holder_id: str, said: Sequence[tuple[dict[str, Any], bool, str | None]]
) -> K25Error | None:
    """The error if some node does not see the folder, or rank 0 not what a node wrote; on rank 0.

    Args:
        run: the run folder.
        folders: which of its folders are looked into, "." for itself.
        holder_id: what is to be found there.
        said: [rank] -> a `Member`, whether it wrote for its node, and what it could not; empty on the others.
    """
    members = [Member(**member) for member, _, _ in said]
    places: dict[str, list[Member]] = {}
    limit_s = location.LOOK_S
    for member, (_, is_writer, trouble) in zip(members, said, strict=True):
        if trouble is None and is_writer:
            trouble = location.sees_tokens(run, folders, holder_id, member.rank, limit_s)
            # The others have had the time as well.
            limit_s = limit_s if trouble is None else 0.0
        if trouble is not None:
            places.setdefault(trouble, []).append(member)
    if not places:
        return None
    found = {trouble: some_of(own, members) for trouble, own in places.items()}
    error = ConfigError(location.not_shared(run, found))
    error.of_ranks = tuple(member.rank for own in places.values() for member in own)
    return error
