"""A checkpoint on storage, as ranges of its tensors can be read from it, whatever layout wrote it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from k25_train.checkpoint.files.access import Buffer
from k25_train.checkpoint.files.index import PartIndex, check_complete, combine, index_of
from k25_train.checkpoint.files.parts import TensorInfo
from k25_train.checkpoint.files.reader import NUM_THREADS, PartsReader, read_headers
from k25_train.checkpoint.files.torch_files import METADATA, TorchReader, old_num_updates, read_old_index
from k25_train.checkpoint.files.writer import bytes_of
from k25_train.checkpoint.manifest import Manifest, read_manifest
from k25_train.errors import CheckpointError, DamagedCheckpointError
from parallel.reshard.ranges import CoverageError, Overlaps, Ranges, overlaps


@dataclass(frozen=True, slots=True)
class Wanted:
    """A range of the elements of a stored tensor."""

    name: str
    """Of the tensor."""
    start: int
    """First element of the flattened tensor."""
    stop: int
    """One after the last."""


class Reader(Protocol):
    """Reads ranges of stored parts."""

    def read(self, wanted: Overlaps, destinations: Sequence[Buffer]) -> None:
        """Copy each range to its destination, [bytes]."""


class StoredCheckpoint:
    """The tensors of a checkpoint. Threads may share it."""

    def __init__(
        self,
        folder: Path | UPath,
        manifest: Manifest,
        index: PartIndex,
        *,
        compares: bool = True,
        num_threads: int = NUM_THREADS,
    ) -> None:
        """From an index that was read before, as by all ranks together (`read_share`, `complete_index`).

        `compares` what is read with its checksums, in so many threads.
        """
        self.folder = folder
        """Where it is."""
        self.manifest = manifest
        """What it says of itself."""
        self.parts = index
        """Which part of which tensor is where."""
        self._reader: Reader = (
            TorchReader(folder, index)
            if is_of_torch(manifest)
            else PartsReader(folder, manifest.part_files, index, compares=compares, num_threads=num_threads)
        )
        self._numbers = {name: number for number, name in enumerate(index.tensors)}

    @classmethod
    def open(cls, folder: Path | UPath) -> Self:
        """Read manifest and headers of one in any format.

        Raises CheckpointError for what is no checkpoint, DamagedCheckpointError for one that is not as it was
        written, naming the file, or the tensor of which elements are missing or there twice.
        """
        manifest = read_manifest(folder)
        return cls(folder, manifest, complete_index(folder, [read_share(folder, manifest, 0, 1)]))

    @property
    def num_updates(self) -> int:
        """Steps that its optimizers had counted.

        Raises CheckpointError if it has none, DamagedCheckpointError.
        """
        if self.manifest.num_updates is not None:
            return self.manifest.num_updates
        if not is_of_torch(self.manifest):
            raise CheckpointError(f"{self.folder} has no optimizer: it holds {self.manifest.kind}")
        return old_num_updates(self.folder)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> whole tensor, by name."""
        return self.parts.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A range of the elements of a tensor, [n], all of them by default.

        Raises CheckpointError if there is no such tensor or range, DamagedCheckpointError naming file and
        tensor if what is stored is not what was written.
        """
        info = self.info(name)
        stop = info.numel if stop is None else stop
        destination = torch.empty(max(0, stop - start), dtype=info.dtype)
        self.read_into([Wanted(name, start, stop)], [destination])
        return destination

    def read_into(self, wanted: Sequence[Wanted], destinations: Sequence[Tensor]) -> None:
        """Read many ranges at once, each stored byte once, into contiguous CPU tensors [n] of the stored
        dtypes.

        Raises as `read` does, and CheckpointError for a destination of another size or dtype.
        """
        for each, destination in zip(wanted, destinations, strict=True):
            info = self.info(each.name)
            if destination.numel() != each.stop - each.start or destination.dtype != info.dtype:
                raise CheckpointError(
                    f"{self.folder}: elements {each.start} to {each.stop} of {each.name} are {info.dtype}, "
                    f"but {destination.numel()} of {destination.dtype} are to be filled with them"
                )
            if destination.device.type != "cpu" or not destination.is_contiguous():
                raise ValueError(f"{each.name}: a destination must be contiguous and on the CPU")
        found = self.overlaps(wanted)
        buffers = [np.asarray(bytes_of(destination)) for destination in destinations]
        size = self.parts.itemsizes[found.ranges.tensor]
        start = np.array([each.start for each in wanted], dtype=np.int64)[found.wanted]
        first, last = (found.ranges.start - start) * size, (found.ranges.stop - start) * size
        self._reader.read(
            found, [buffers[which][a:b] for which, a, b in zip(found.wanted, first, last, strict=True)]
        )

    def read_parts(self, found: Overlaps, destinations: Sequence[Tensor]) -> None:
        """Read ranges of given parts, whether or not other parts hold the same elements.

        Args:
            found: the parts, and the ranges of them.
            destinations: per overlap, [n] of the stored dtype, contiguous, on the CPU.

        Raises DamagedCheckpointError as `read` does.
        """
        self._reader.read(found, [np.asarray(bytes_of(destination)) for destination in destinations])

    def overlaps(self, wanted: Sequence[Wanted]) -> Overlaps:
        """Where the elements of ranges are stored. Raises CheckpointError if some are not."""
        rows = [(self.number(each.name), each.start, each.stop) for each in wanted]
        try:
            return overlaps(Ranges.of(rows), self.parts.ranges, self.parts.numels, self.parts.names)
        except CoverageError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error

    def info(self, name: str) -> TensorInfo:
        """A whole tensor. Raises CheckpointError if there is none of this name."""
        self.number(name)
        return self.tensors[name]

    def number(self, name: str) -> int:
        """Its place among `tensors`. Raises CheckpointError if there is none of this name."""
        if name not in self._numbers:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._numbers[name]


def is_of_torch(manifest: Manifest) -> bool:
    """Whether a checkpoint has torch's files: formats 1 and 2."""
    return METADATA in manifest.files


def read_share(folder: Path | UPath, manifest: Manifest, share: int, num_shares: int) -> PartIndex:
    """What is in every `num_shares`-th file: a rank's share of the headers, to be gathered.

    Formats 1 and 2 have one index, `.metadata`, which is the first share.

    Raises DamagedCheckpointError naming a file that is not as it was written.
    """
    if is_of_torch(manifest) and share == 0:
        return read_old_index(folder)
    names = list(manifest.part_files)[share::num_shares]
    headers = read_headers(folder, {name: manifest.files[name] for name in names})
    try:
        return index_of(headers)
    except CheckpointError as error:
        raise DamagedCheckpointError(f"{folder}: {error}", folder, None) from error


def complete_index(folder: Path | UPath, shares: Sequence[PartIndex]) -> PartIndex:
    """The index of all shares of the files, in which every element is once.

    Raises DamagedCheckpointError naming a tensor of which that is not true.
    """
    try:
        index = combine(shares)
        check_complete(index)
    except CheckpointError as error:
        raise DamagedCheckpointError(f"{folder}: {error}", folder, None) from error
    return index
