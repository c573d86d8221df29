"""Save and load the sharded state of a run with megatron-core's distributed checkpointing.

Every tensor is stored under its place in the whole model, so a checkpoint loads into any layout. Optimizer
state uses the format that can be re-sharded over pipeline, expert and data-parallel sizes. Data-parallel
ranks write about equal shares of what they all hold. Each reads what it needs itself: sharing the reading out
as well would send every expert to every rank of a stage.
"""

import contextlib
import errno
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.checking import check, check_content
from k25_train.checkpoint.data_state import DataState
from k25_train.checkpoint.finite import state_not_finite
from k25_train.checkpoint.integrity import BACKEND, METADATA, entry_of
from k25_train.checkpoint.manifest import FileEntry, Manifest
from k25_train.checkpoint.publish import publish
from k25_train.checkpoint.sharded import read_sharded, write_sharded
from k25_train.checkpoint.storage.kinds import PARTIAL, Place
from k25_train.checkpoint.storage.places import POSIX
from k25_train.compose.resolve import to_yaml
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError
from parallel.megatron.patches.checkpoint_reading import bytes_by_file
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
    root: Path,
    step: int,
    chunks: list[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    config: Config,
    *,
    facts: Mapping[str, str] | None = None,
    losses: Sequence[float] = (),
    why_unsound: str = "",
    data: DataState | None = None,
) -> Place:
    """Write `root/step_<step>` and return it; called by every rank.

    If `why_unsound` says so, or a weight or moment is not finite, it becomes `step_<step>.unsound`.

    Args:
        facts: what is true of the data that was trained on; rank 0's count.
        losses: of the last sound steps, which those of a resumed run are compared with.
        why_unsound: what was wrong with the last step; empty if nothing was. The same on every rank.
        data: how far the data were read; rank 0's counts. None leaves it out.

    Raises `CheckpointError` naming the folder, on every rank, if any rank cannot write (a full disk, say), or
    a file is not seen by rank 0 as it was written; checkpoints already there stay untouched.
    """
    folder = root / f"step_{step}{PARTIAL}"
    texts = {folders.CONFIG: to_yaml(config)} | ({} if data is None else {folders.DATA_STATE: data.to_text()})
    complete_parameters(chunks)
    try:
        ruined = state_not_finite([_unwrap(chunk) for chunk in chunks], optimizer)
        on_first_rank(lambda: folders.prepare_partial(root, step))
        state = sharded_state(chunks, optimizer, is_loading=False)
        written = write_sharded(state, folder, chunks[0].dp_group)
        return on_first_rank(
            lambda: publish(
                root,
                folder,
                Manifest(
                    step=step,
                    files=_with_metadata(folder, written),
                    facts=facts or {},
                    losses=losses,
                    why_unsound="; ".join(filter(None, (why_unsound, ruined))),
                ),
                texts,
            )
        )
    except (OSError, CheckpointError) as error:
        lost = CheckpointError(_not_written(folder, error))
        # It would keep a full disk full, and the run from starting again there.
        on_first_rank(lambda: _drop(folder))
        raise lost from error


def _with_metadata(folder: Path, written: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """What the ranks wrote, and what rank 0 did. Raises `CheckpointError` for a file that no rank wrote."""
    for name, least_bytes in bytes_by_file(folder / METADATA).items():
        if name not in written:
            raise CheckpointError(f"{folder / name}: no rank wrote it, though {METADATA} names it")
        if (found := written[name].num_bytes) < least_bytes:
            raise CheckpointError(f"{folder / name}: has {found} of {least_bytes} bytes")
    return {**written, **{name: entry_of(folder / name) for name in (METADATA, BACKEND)}}


def load(
    folder: Place,
    config: Config,
    chunks: list[torch.nn.Module],
    optimizer: ChainedOptimizer | None,
    *,
    facts: Mapping[str, str] | None = None,
) -> int:
    """Load a checkpoint into the chunks and, to go on training, the optimizer; returns its step.

    The layout may differ from the one that saved. Called by every rank; each reads a share of all files once
    to compare their content with the checksums.

    Raises `CheckpointError`, on every rank, if files are missing, cut short or changed, if they hold what no
    checkpoint has, or if the configuration, or with an optimizer the `facts` of rank 0, contradict those of
    the training so far.
    """
    manifest = on_first_rank(lambda: check(folder, config, facts or {}, resumes=optimizer is not None))
    check_content(folder, manifest)
    state = sharded_state(chunks, optimizer, is_loading=True)
    loaded = read_sharded(state, folder, has_checksums=manifest.has_checksums)
    for index, chunk in enumerate(chunks):
        missing, unexpected = _unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected, f"{folder} gave tensors that nobody asked for: {unexpected}"
        assert not _weights(dict.fromkeys(missing)), f"{folder} left tensors out: {missing}"
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
    return manifest.step


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


def _drop(folder: Path) -> None:
    with contextlib.suppress(OSError):
        POSIX.remove(folder)


def _not_written(folder: Path, error: Exception) -> str:
    root = folder.parent
    newest = folders.newest_checkpoint(root)
    safe = f"{newest} is complete" if newest else "no earlier checkpoint exists"
    try:
        free = f"{shutil.disk_usage(root).free:,} bytes are free there, "
    except OSError:
        free = ""
    full = (errno.ENOSPC, errno.EDQUOT)
    is_full = getattr(error, "errno", None) in full or any(f"[Errno {code}]" in str(error) for code in full)
    advice = "make room" if is_full else "see that every rank may write there"
    return (
        f"{folder}: could not be written ({error}); {free}{safe}; {advice}, or move the run folder and set "
        "run.dir, and start again"
    )
