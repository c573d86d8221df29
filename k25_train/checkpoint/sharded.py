"""The sharded state on disk, through megatron-core, so that a failure of any rank is known to all.

megatron-core gathers what ranks fail to write. It leaves ranks waiting for one that fails otherwise: the
first when it writes `.metadata` or `metadata.json`, any when it reads.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from k25_train.checkpoint.agreement import on_every_rank, on_first_rank
from k25_train.checkpoint.integrity import BACKEND, damaged, entry_of
from k25_train.checkpoint.manifest import FileEntry
from k25_train.errors import CheckpointError


def write_sharded(state: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> dict[str, FileEntry]:
    """Write `state` into the empty `folder`; called by every rank.

    Args:
        state: what `sharded_state` describes.
        folder: seen by all ranks.
        group: ranks that hold the same, of which each writes its share.

    Returns:
        On rank 0, the files that the ranks wrote with their checksums, each hashed by its rank; else nothing.

    Raises `CheckpointError` with the causes, on every rank, if one failed.
    """
    on_every_rank(lambda: _check_writable(folder))
    strategy = _Strategy()
    sharded, common = save_preprocess(state)
    rank = dist.get_rank()
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    try:
        FullyParallelSaveStrategyWrapper(strategy, group).save(sharded, folder)
    except CheckpointException as error:
        # Every rank gets here at once, but torch tells the cause to rank 0 alone.
        raise CheckpointError(on_first_rank(partial(causes_of, error))) from error
    on_first_rank(lambda: _finish(strategy, folder))
    by_rank = on_every_rank(lambda: _written_by(rank, folder))
    return {name: entry for written in by_rank for name, entry in written.items()}


def read_sharded(state: dict[str, Any], folder: Path, *, has_checksums: bool) -> dict[str, Any]:
    """Read what `state` describes; called by every rank, each of which reads what it needs.

    Raises `CheckpointError` with the causes, on every rank, if one failed: what was checked before cannot be
    damaged, so it does not fit.
    """
    loaded: dict[str, Any] = {}

    def read() -> None:
        try:
            # Nothing in this waits for other ranks; shards are validated when they are saved.
            loaded.update(dist_checkpointing.load(state, str(folder), validate_access_integrity=False))
        except CheckpointException as error:
            raise CheckpointError("; ".join(str(cause) for cause, _ in error.failures.values())) from error

    try:
        on_every_rank(read)
    except CheckpointError as error:
        if has_checksums:
            raise CheckpointError(f"{folder}: does not fit the configured model: {error}") from error
        doubt = "does not fit the configured model, or is damaged (it was saved without checksums)"
        what = f"{folder}: {doubt}: {error}"
        raise on_first_rank(lambda: damaged(folder, what)) from error
    return loaded


def causes_of(error: CheckpointException) -> str:
    """What went wrong on each rank, as far as torch tells."""
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())


class _Strategy(TorchDistSaveShardedStrategy):
    """Keeps what fails when the first rank writes `.metadata`, instead of raising it there alone."""

    failure: Exception | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        writer.finish = self._keeping_failure(writer.finish)
        return super()._get_save_and_finalize_callbacks(writer, *args)

    def _keeping_failure(self, finish: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            try:
                finish(*args)
            except Exception as error:
                self.failure = error

        return call


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there: the run folder must be one that all nodes share")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be written to")


def _finish(strategy: _Strategy, folder: Path) -> None:
    if strategy.failure is not None:
        raise strategy.failure
    save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))
    with (folder / BACKEND).open("rb") as file:
        os.fsync(file.fileno())


def _written_by(rank: int, folder: Path) -> dict[str, FileEntry]:
    """The files of a rank, numbered from 0 by megatron-core; without listing the folder."""
    entries: dict[str, FileEntry] = {}
    while (path := folder / f"__{rank}_{len(entries)}.distcp").is_file():
        entries[path.name] = entry_of(path)
    return entries
