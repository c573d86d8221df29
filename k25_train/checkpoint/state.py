"""Save and load the sharded state of a run with megatron-core's distributed checkpointing.

Every tensor is stored under its place in the whole model, so a checkpoint loads into any layout. Optimizer
state uses the format that can be re-sharded over pipeline, expert and data-parallel sizes. Data-parallel
ranks write about equal shares of what they all hold. Each reads what it needs itself: sharing the reading out
as well would send every expert to every rank of a stage.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from k25_train.checkpoint import folders
from k25_train.checkpoint.continuity import SAME_MODEL, SAME_RUN, check_continuity
from k25_train.compose.resolve import to_yaml
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError, K25Error
from parallel.megatron.replicas import EncoderReplica, complete_parameters

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(
    chunks: list[torch.nn.Module], optimizer: ChainedOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    """Describe this rank's part of the run's state: model chunks and, if given, the optimizer."""
    state: dict[str, Any] = {
        f"model{index}": _weights(_describing(chunk).sharded_state_dict(metadata=dict(_METADATA)))
        for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        models = dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=dict(_METADATA)
        )
    return state


def save(
    root: Path, step: int, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, config: Config
) -> None:
    """Write `root/step_<step>`; called by every rank.

    Raises `CheckpointError` naming the folder if it cannot be written (a full disk, say); checkpoints already
    there stay untouched.
    """
    folder = folders.partial_folder(root, step)
    complete_parameters(chunks)
    # Else the first data-parallel rank writes all that it shares with the others.
    shared_out = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), chunks[0].dp_group)
    try:
        on_first_rank(lambda: folders.prepare_partial(root, step))
        state = sharded_state(chunks, optimizer, is_loading=False)
        dist_checkpointing.save(state, str(folder), shared_out)
        on_first_rank(lambda: folders.publish(root, step, to_yaml(config)))
    except OSError as error:
        raise CheckpointError(_not_written(folder, str(error))) from error
    except CheckpointException as error:
        # Every rank gets here at once, but torch tells the cause to rank 0 alone.
        causes = on_first_rank(partial(_causes, error))
        raise CheckpointError(_not_written(folder, causes)) from error


def load(
    folder: Path, config: Config, chunks: list[torch.nn.Module], optimizer: ChainedOptimizer | None
) -> int:
    """Load a checkpoint into the chunks and, to go on training, the optimizer; returns its step.

    The layout may differ from the one that saved. Raises `CheckpointError` if files are missing or cut short,
    or if the configuration contradicts the one it was trained with.
    """
    step = folders.verify(folder)
    check_continuity(folder, config, SAME_MODEL if optimizer is None else SAME_RUN)
    state = sharded_state(chunks, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except dist_checkpointing.core.CheckpointingException as error:
        raise CheckpointError(f"{folder}: does not fit the configured model: {error}") from error
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: does not fit the configured model: {_causes(error)}") from error
    for index, chunk in enumerate(chunks):
        missing, unexpected = _unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected, f"{folder} gave tensors that nobody asked for: {unexpected}"
        assert not _weights(dict.fromkeys(missing)), f"{folder} left tensors out: {missing}"
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
    return step


def on_first_rank[T](action: Callable[[], T]) -> T:
    """Do something to files on rank 0 alone; every rank gets its result, or raises its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, K25Error) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def _load_optimizer(optimizer: ChainedOptimizer, loaded: dict[int, dict[str, Any]]) -> None:
    """Take moments and step over; weight decay and the like are as configured now, not as saved."""
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(_by_optimizer(loaded, len(optimizer.chained_optimizers)))
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)


def _by_optimizer(loaded: dict[int, dict[str, Any]], num_optimizers: int) -> dict[int, dict[str, Any]]:
    """What was loaded, for as many optimizers as there are now.

    A decoupled encoder has its own optimizers after the others, a coupled tower does not. Tensors are
    loaded by name and are right in any case; what else is kept, counts of steps, is the same of all.
    """
    return {number: loaded[0] | loaded.get(number, {}) for number in range(num_optimizers)}


def _weights(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without what Transformer Engine's modules add, so that runs go on with and without it."""
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def _unwrap(chunk: torch.nn.Module) -> Any:
    """The model chunk inside its data-parallel wrapper."""
    return getattr(chunk, "module", chunk)


def _describing(chunk: torch.nn.Module) -> Any:
    """What knows how a chunk's weights are spread: an encoder's wrapper, else the chunk itself."""
    return chunk if isinstance(chunk, EncoderReplica) else _unwrap(chunk)


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())


def _not_written(folder: Path, cause: str) -> str:
    root = folder.parent
    newest = folders.newest_checkpoint(root)
    free = f"{shutil.disk_usage(root).free:,} bytes are free there, " if root.is_dir() else ""
    safe = f"{newest} is complete" if newest else "no earlier checkpoint exists"
    return (
        f"{folder}: could not be written ({cause}); {free}{safe}; make room, or move the run folder and set "
        "run.dir, and start again"
    )
