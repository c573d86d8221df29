"""Save and load the sharded state of a run with megatron-core's distributed checkpointing.

Every tensor is stored under its place in the whole model, so a checkpoint loads into any layout. Optimizer
state uses the format that can be re-sharded over pipeline, expert and data-parallel sizes.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from k25_train.checkpoint import folders
from k25_train.errors import CheckpointError

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(
    chunks: list[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    """Describe this rank's part of the run's state: model chunks and, if given, the optimizer."""
    state: dict[str, Any] = {
        f"model{index}": _unwrap(chunk).sharded_state_dict(metadata=_METADATA)
        for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        models = dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_METADATA)
    return state


def save(
    root: Path, step: int, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, config_yaml: str
) -> None:
    """Write `root/step_<step>`; called by every rank.

    Raises `CheckpointError` naming the folder if it cannot be written (a full disk, say); checkpoints already
    there stay untouched.
    """
    try:
        if dist.get_rank() == 0:
            folder = folders.prepare_partial(root, step)
            (folder / "config.yaml").write_text(config_yaml)
        dist.barrier()
        state = sharded_state(chunks, optimizer, is_loading=False)
        dist_checkpointing.save(state, str(folders.partial_folder(root, step)))
        dist.barrier()
        if dist.get_rank() == 0:
            folders.publish(root, step)
        dist.barrier()
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{folders.partial_folder(root, step)}: could not be written ({error}); "
            f"{_what_is_safe(root)}; free space there or change run.dir, and start again"
        ) from error


def load(folder: Path, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer | None) -> int:
    """Load a checkpoint into the chunks and, if given, the optimizer; returns its step.

    The layout may differ from the one that saved. Raises `CheckpointError` if files are missing or cut short,
    or if its tensors are not this model's.
    """
    step = folders.verify(folder)
    state = sharded_state(chunks, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except dist_checkpointing.core.CheckpointingException as error:
        raise CheckpointError(f"{folder}: holds another model than the configured one: {error}") from error
    for index, chunk in enumerate(chunks):
        _unwrap(chunk).load_state_dict(loaded[f"model{index}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return step


def _unwrap(chunk: torch.nn.Module) -> Any:
    """The model chunk inside its data-parallel wrapper."""
    return getattr(chunk, "module", chunk)


def _what_is_safe(root: Path) -> str:
    newest = folders.newest_checkpoint(root)
    return f"{newest} is complete" if newest else "no earlier checkpoint exists"
