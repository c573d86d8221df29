"""Load a checkpoint from the nodes' own disks: every rank reads the very ranges that it wrote."""

from collections.abc import Sequence
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from k25_train.checkpoint.agreement import gather_from_ranks
from k25_train.checkpoint.files.index import index_of
from k25_train.checkpoint.files.reader import read_headers
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.loading import complete, fill, misfits
from k25_train.checkpoint.local.store import files_of
from k25_train.checkpoint.manifest import read_manifest
from k25_train.checkpoint.pieces import Piece, pieces
from k25_train.errors import CheckpointError


def load_local(
    folder: Path, rank: int, modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer
) -> str:
    """Load what `rank` wrote; every rank calls it. Returns why that cannot be done, the same on all ranks;
    then the state is whatever was read, and has to be loaded from elsewhere.

    Args:
        folder: the checkpoint on this rank's node.
        rank: this one.
        modules: model chunks and the decoupled encoder.
        optimizer: of all that is trained.
    """
    try:
        updates = set(gather_from_ranks(lambda: _read(folder, rank, pieces(modules, optimizer))))
    except CheckpointError as error:
        return str(error)
    if len(updates) != 1:
        return f"nodes count {sorted(updates)} updates"
    complete(modules, trains=True)
    for part in optimizer.chained_optimizers:
        part.count_from(next(iter(updates)))
    return ""


def _read(folder: Path, rank: int, wanted: Sequence[Piece]) -> int:
    """Fill this rank's pieces. Returns how many updates the optimizers had done."""
    manifest = read_manifest(folder)
    own = files_of(manifest, rank)
    stored = StoredCheckpoint(folder, manifest, index_of(read_headers(folder, own)))
    # What is missing of a tensor is found where it is looked for.
    if found := misfits(stored, wanted):
        raise CheckpointError(f"{folder}: {found[0]}")
    fill(stored, wanted)
    return int(manifest.num_updates or 0)
