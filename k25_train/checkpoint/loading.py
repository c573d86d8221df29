"""Load a checkpoint into any layout: every byte of it is read once, by one rank.

```
 rank 0       manifest, configuration and facts: may this run go on from it?
 every rank   headers of a share of the files ──► gathered: which range of which tensor is where
 every rank   ranges of its pieces ──► its optimizer shards, its shard of the weights, its share of the rest
 every group  weights gathered as after an update, the rest broadcast by the ranks that have read it
```
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from k25_train.checkpoint.agreement import gather_from_ranks, on_every_rank, on_first_rank
from k25_train.checkpoint.checking import check, check_content, newest_whole_other
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.stored import (
    StoredCheckpoint,
    Wanted,
    complete_index,
    is_of_torch,
    read_share,
)
from k25_train.checkpoint.integrity import damaged, damaged_with
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.pieces import OPTIMIZER_STATE, Piece, Replicated, pieces, replicated
from k25_train.checkpoint.storage.kinds import Place
from k25_train.config.checkpoint import CheckpointConfig, Verify
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError, DamagedCheckpointError
from k25_train.plan.memory.checkpoint import LOAD_STAGING_BYTES

_ALIGNMENT = 64
"""Bytes at whose multiples ranges begin in it."""
_MOST_TOLD = 8
"""Tensors that an error names."""


def load(
    folder: Place,
    config: Config,
    modules: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer | None,
    *,
    facts: Mapping[str, str] | None = None,
) -> int:
    """Load a checkpoint into the modules and, to go on training, the optimizer; returns its step.

    Called by every rank; the layout may differ from the one that saved.

    Args:
        folder: of the checkpoint.
        config: of this run.
        modules: model chunks and the decoupled encoder.
        optimizer: of all that is trained; None for weights alone.
        facts: what is true of the data; rank 0's count, with an optimizer.

    Raises `CheckpointError`, on every rank, if files are missing, cut short or changed, or if configuration,
    shapes or facts contradict those of the training so far.
    """
    manifest = on_first_rank(lambda: check(folder, config, facts or {}, resumes=optimizer is not None))
    # Older formats have checksums of whole files alone.
    if is_of_torch(manifest) and config.checkpoint.verify is Verify.full:
        check_content(folder, manifest)
    stored = open_together(folder, manifest, config.checkpoint)
    read_pieces(stored, pieces(modules, optimizer))
    complete(modules, trains=optimizer is not None)
    if optimizer is not None:
        num_updates = on_first_rank(lambda: stored.num_updates)
        for part in optimizer.chained_optimizers:
            part.count_from(num_updates)
    return manifest.step


def open_together(folder: Place, manifest: Manifest, how: CheckpointConfig) -> StoredCheckpoint:
    """What is where in a checkpoint. Called by every rank, each of which reads its share of the headers.

    `how` says how many threads of a rank read, and what they compare with checksums.

    Raises `DamagedCheckpointError`, on every rank, naming a file or a tensor that is not as it was written.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shares = _together(folder, lambda: read_share(folder, manifest, rank, num_ranks))
    try:
        index = complete_index(folder, shares)
    except DamagedCheckpointError as error:
        # All ranks have the same headers and get here.
        what = str(error)
        raise on_first_rank(lambda: damaged(folder, what)) from error
    compares = how.verify is Verify.full
    return StoredCheckpoint(folder, manifest, index, compares=compares, num_threads=how.writers)


def read_pieces(stored: StoredCheckpoint, wanted: Sequence[Piece]) -> None:
    """Fill this rank's pieces from storage. Called by every rank.

    Raises `CheckpointError`, on every rank, naming tensors that the checkpoint lacks or has in another shape,
    and `DamagedCheckpointError` naming file and tensor of what is not as it was written.
    """
    found = on_every_rank(lambda: misfits(stored, wanted))
    on_first_rank(lambda: _check_fits(stored.folder, {line for lines in found for line in lines}))
    _check_none_is_left(stored, wanted)
    _together(stored.folder, lambda: fill(stored, wanted))


def misfits(stored: StoredCheckpoint, wanted: Sequence[Piece]) -> list[str]:
    """Tensors that the checkpoint lacks or has in another shape, a line each, some of them."""
    found = {}
    for part in (piece.part for piece in wanted):
        own, info = f"{list(part.shape)} in the model", stored.tensors.get(part.name)
        if info is None:
            found[part.name] = f"{part.name}: not in the checkpoint, {own}"
        elif info.shape != part.shape:
            found[part.name] = f"{part.name}: {list(info.shape)} in the checkpoint, {own}"
    return [found[name] for name in sorted(found)[:_MOST_TOLD]]


def fill(stored: StoredCheckpoint, wanted: Sequence[Piece]) -> None:
    """Read pieces: straight into host memory, through a staging buffer to the device or another dtype."""
    direct, staged = divided(stored, wanted)
    stored.read_into([_wanted(piece.part) for piece in direct], [piece.tensor for piece in direct])
    staging = torch.empty(LOAD_STAGING_BYTES if staged else 0, dtype=torch.uint8)
    for batch in batches(stored, staged, LOAD_STAGING_BYTES):
        buffers, offset = [], 0
        for piece in batch:
            dtype = stored.tensors[piece.part.name].dtype
            num_bytes = piece.part.numel * dtype.itemsize
            buffers.append(staging[offset : offset + num_bytes].view(dtype))
            offset += _aligned(num_bytes)
        stored.read_into([_wanted(piece.part) for piece in batch], buffers)
        for piece, buffer in zip(batch, buffers, strict=True):
            piece.tensor.copy_(buffer)


def divided(stored: StoredCheckpoint, wanted: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Pieces that files are read straight into, and those on the device or of another dtype than stored."""
    direct: list[Piece] = []
    staged: list[Piece] = []
    for piece in wanted:
        is_same = piece.tensor.dtype == stored.tensors[piece.part.name].dtype
        (direct if is_same and piece.tensor.device.type == "cpu" else staged).append(piece)
    return direct, staged


def batches(stored: StoredCheckpoint, staged: Sequence[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Pieces, cut where they are too long, that have room in so many bytes together."""
    batch: list[Piece] = []
    room = most_bytes
    for piece in staged:
        size, start = stored.tensors[piece.part.name].dtype.itemsize, 0
        while start < piece.part.numel:
            stop = min(piece.part.numel, start + room // size)
            if stop > start:
                batch.append(Piece(piece.part.cut(start, stop), piece.tensor[start:stop]))
                room -= _aligned((stop - start) * size)
                start = stop
            if start < piece.part.numel:
                yield batch
                batch, room = [], most_bytes
    if batch:
        yield batch


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@torch.no_grad()
def complete(modules: Sequence[DistributedDataParallel], *, trains: bool) -> None:
    """Give every rank what other ranks have read of its weights. Called by every rank.

    Args:
        trains: whether there is an optimizer, in whose shards weights were read.
    """
    for module in modules:
        if trains:
            module.start_param_sync(force_sync=True)
        for each in replicated(module, trains=trains):
            if each.group.size() > 1:
                _broadcast(each)


def _broadcast(each: Replicated) -> None:
    shares = each.shares()
    sources = dist.get_process_group_ranks(each.group)
    # What all ranks have alike goes through the communicator that all of them have.
    group = None if len(sources) == dist.get_world_size() else each.group
    columns = (shares.replica, shares.item, shares.start, shares.stop)
    for replica, item, start, stop in zip(*columns, strict=True):
        dist.broadcast(each.tensors[item].flat[start:stop], src=sources[replica], group=group)


def _check_fits(folder: Place, differences: Collection[str]) -> None:
    if differences:
        lines = "".join(f"\n  {each}" for each in sorted(differences)[:_MOST_TOLD])
        raise CheckpointError(f"{folder} does not fit the configured model:{lines}")


def _check_none_is_left(stored: StoredCheckpoint, wanted: Sequence[Piece]) -> None:
    """Raise `CheckpointError` naming tensors that the checkpoint has and no rank wants: something of the run
    would be lost. Of one whose optimizer state nobody wants, weights alone count."""
    by_rank = on_every_rank(lambda: sum(piece.part.numel for piece in wanted))
    states = on_every_rank(lambda: any(_is_state(piece.part.name) for piece in wanted))
    stored_count = sum(
        info.numel for name, info in stored.tensors.items() if any(states) or not _is_state(name)
    )
    if not on_first_rank(lambda: sum(by_rank) != stored_count):
        return
    names = on_every_rank(lambda: {piece.part.name for piece in wanted})
    on_first_rank(lambda: _check_names(stored, set().union(*names), any(states)))


def _check_names(stored: StoredCheckpoint, wanted: Collection[str], with_state: bool) -> None:
    left = [name for name in stored.tensors if name not in wanted and (with_state or not _is_state(name))]
    what = "\n  ".join(f"{name}: in the checkpoint, not in the model" for name in left[:_MOST_TOLD])
    raise CheckpointError(f"{stored.folder} does not fit the configured model:\n  {what}")


def _is_state(name: str) -> bool:
    return name.startswith(f"{OPTIMIZER_STATE}.")


def _together[Result](folder: Place, action: Callable[[], Result]) -> list[Result]:
    """Do something on every rank, and get all results. What one finds damaged is an error of all."""

    def attempt() -> tuple[Result | None, str]:
        try:
            return action(), ""
        except DamagedCheckpointError as error:
            return None, str(error)

    found = gather_from_ranks(attempt)
    if what := on_first_rank(lambda: next((text for _, text in found if text), "")):
        raise damaged_with(folder, what, newest_whole_other(folder))
    return [result for result, _ in found if result is not None]


def _wanted(part: Part) -> Wanted:
    return Wanted(part.name, part.start, part.stop)
