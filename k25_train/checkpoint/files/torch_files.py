"""Checkpoints of formats 1 and 2: torch's `.metadata` and `.distcp`, as megatron-core 0.19 wrote them.

Every stored item is a pickled tensor of its own, which is read whole. Nothing is unpickled but plain data.
Its bytes have no checksums per block: that of the file is compared before (`checkpoint/integrity.py`).
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from upath import UPath

from k25_train.checkpoint.files.access import Buffer, opened, read_bytes
from k25_train.checkpoint.files.damage import damage
from k25_train.checkpoint.files.index import PartIndex, index_of_rows
from k25_train.checkpoint.files.parts import TensorInfo
from k25_train.checkpoint.files.plain_pickle import load_metadata, load_plain_data
from k25_train.checkpoint.files.reader import NUM_THREADS
from k25_train.checkpoint.files.writer import bytes_of
from parallel.reshard.ranges import Overlaps

METADATA = ".metadata"
"""Which tensor is where, in torch's format."""


def read_old_index(folder: Path | UPath) -> PartIndex:
    """What `.metadata` says is where.

    Raises DamagedCheckpointError naming it if it holds something else, or an item that is no range of its
    flattened tensor.
    """
    with damage(folder, METADATA), (folder / METADATA).open("rb") as file:
        return _index_of(load_metadata(file))


def old_num_updates(folder: Path | UPath) -> int:
    """Steps that the optimizers had counted. Raises DamagedCheckpointError if nothing tells."""
    with damage(folder, METADATA):
        with (folder / METADATA).open("rb") as file:
            metadata = load_metadata(file)
        steps = {int(step) for state in _plain_items(folder, metadata) for step in _steps_in(state)}
        if len(steps) != 1:
            raise ValueError(f"its optimizers count {sorted(steps)} steps")
        return steps.pop()


class TorchReader:
    """Reads ranges of stored items, each item once per call."""

    def __init__(self, folder: Path | UPath, index: PartIndex) -> None:
        self._folder, self._index = folder, index

    def read(self, wanted: Overlaps, destinations: Sequence[Buffer]) -> None:
        """Copy ranges of items to where they go, [bytes] each.

        Raises DamagedCheckpointError naming file and tensor for an item that is not what `.metadata` says.
        """
        order = np.argsort(wanted.stored, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(wanted.stored[order])) + 1) if len(order) else []
        with ThreadPoolExecutor(NUM_THREADS, "checkpoint-reader") as pool:
            for _ in pool.map(lambda group: self._copy(wanted, group, destinations), groups):
                pass

    def _copy(self, wanted: Overlaps, group: NDArray[np.intp], destinations: Sequence[Buffer]) -> None:
        stored = int(wanted.stored[group[0]])
        data = self._load(stored)
        itemsize = int(self._index.itemsizes[self._index.ranges.tensor[stored]])
        begin = int(self._index.ranges.start[stored])
        for each in group:
            first, last = int(wanted.ranges.start[each]) - begin, int(wanted.ranges.stop[each]) - begin
            destinations[each][:] = data[first * itemsize : last * itemsize]

    def _load(self, stored: int) -> Buffer:
        """The bytes of an item's elements."""
        part, name = self._index.part(stored), self._index.files[int(self._index.file[stored])]
        with damage(self._folder, name, part.entry), opened(self._folder / name) as file:
            data = read_bytes(file, int(self._index.offset[stored]), int(self._index.length[stored]))
            tensor = load_plain_data(io.BytesIO(data), part.name)
            if tensor.dtype != part.dtype or tensor.numel() != part.numel:
                raise ValueError(f"it has {tensor.numel()} elements of {tensor.dtype}")
            return np.asarray(bytes_of(tensor.contiguous()))


def start_in(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> int:
    """First element of a box within a flattened tensor.

    Raises ValueError if the box is not one range of it: all axes before the one that is cut have size 1, all
    after it are whole.
    """
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        raise ValueError(f"{list(sizes)} at {list(offsets)} is no box within {list(shape)}")
    cut = next((axis for axis, size in enumerate(sizes) if size != 1), len(shape))
    is_range = all(sizes[axis] == shape[axis] for axis in range(cut + 1, len(shape)))
    is_inside = all(0 <= a <= a + n <= whole for a, n, whole in zip(offsets, sizes, shape, strict=True))
    if not is_range or not is_inside:
        raise ValueError(f"{list(sizes)} at {list(offsets)} is no range of the flattened {list(shape)}")
    return sum(offset * math.prod(shape[axis + 1 :]) for axis, offset in enumerate(offsets))


def _index_of(metadata: Metadata) -> PartIndex:
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[tuple[str, tuple[int, ...]], Sequence[int]] = {}
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            tensors[name] = TensorInfo(stored.properties.dtype, tuple(stored.size))
            sizes.update({(name, tuple(chunk.offsets)): tuple(chunk.sizes) for chunk in stored.chunks})
    numbers = {name: number for number, name in enumerate(tensors)}
    files: dict[str, int] = {}
    rows = []
    for where, item in metadata.storage_data.items():
        if where.fqn not in tensors:
            continue
        if getattr(item, "transform_descriptors", None):
            raise ValueError(
                f"{where.fqn} is stored as {item.transform_descriptors}, which no run of ours did"
            )
        offsets = tuple(where.offset)
        box = sizes[where.fqn, offsets]
        try:
            start = start_in(tensors[where.fqn].shape, offsets, box)
        except ValueError as error:
            raise ValueError(f"{where.fqn}: {error}") from error
        file = files.setdefault(_checked(item.relative_path), len(files))
        rows.append((numbers[where.fqn], start, start + math.prod(box), file, item.offset, item.length, 0))
    # They have no checksums of blocks.
    return index_of_rows(tensors, list(files), rows, [0] * len(files))


def _plain_items(folder: Path | UPath, metadata: Metadata) -> Iterator[Any]:
    """What is stored that is no tensor."""
    for where, item in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(where.fqn), BytesStorageMetadata):
            with opened(folder / _checked(item.relative_path)) as file:
                data = read_bytes(file, item.offset, item.length)
            yield load_plain_data(io.BytesIO(data), where.fqn)


def _steps_in(state: Any) -> Iterator[float]:
    """The step of every group of parameters."""
    if isinstance(state, Mapping):
        for group in state.get("param_groups", []):
            if "step" in group:
                yield group["step"]
        for value in state.values():
            yield from _steps_in(value)
    elif isinstance(state, list):
        for value in state:
            yield from _steps_in(value)


def _checked(name: str) -> str:
    """A name that stays in the folder."""
    if not isinstance(name, str) or not name or "/" in name or name.startswith(".."):
        raise ValueError(f"{name!r} is not a file of the checkpoint")
    return name
