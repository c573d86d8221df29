"""Which part of which tensor is where, as arrays: a million parts take 36 MB and are searched at once.

Headers are read by shares (a share of the files per rank), made into an index each, and put together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from k25_train.checkpoint.files.header import Header
from k25_train.checkpoint.files.parts import Part, TensorInfo
from k25_train.errors import CheckpointError
from parallel.reshard.ranges import CoverageError, Ranges, check_covered

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class PartIndex:
    """Parts in files. Every array has an entry per part."""

    tensors: dict[str, TensorInfo]
    """Name -> whole tensor, in the order of `ranges.tensor`."""
    files: tuple[str, ...]
    """Names of files, in the order of `file`."""
    ranges: Ranges
    """Which elements of which tensor."""
    file: NDArray[np.int32]
    """Which file holds it."""
    offset: Numbers
    """First byte of its data in the file."""
    length: Numbers
    """Bytes that it takes there."""
    block: Numbers
    """First of its checksums in the table of the file."""
    table_offset: Numbers
    """Per file: where its table starts."""

    def __len__(self) -> int:
        return len(self.ranges)

    @cached_property
    def names(self) -> list[str]:
        """Of the tensors, in the order of `ranges.tensor`."""
        return list(self.tensors)

    @cached_property
    def numels(self) -> Numbers:
        """Elements per tensor."""
        return np.array([info.numel for info in self.tensors.values()], dtype=np.int64)

    @cached_property
    def itemsizes(self) -> Numbers:
        """Bytes of an element, per tensor."""
        return np.array([info.dtype.itemsize for info in self.tensors.values()], dtype=np.int64)

    def part(self, index: int) -> Part:
        """One part."""
        name = self.names[self.ranges.tensor[index]]
        info = self.tensors[name]
        return Part(name, info.dtype, info.shape, int(self.ranges.start[index]), int(self.ranges.stop[index]))


def index_of(headers: Mapping[str, Header]) -> PartIndex:
    """The parts of some files: name -> header. Raises CheckpointError if two tell one tensor differently."""
    tensors: dict[str, TensorInfo] = {}
    numbers: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    for file, (name, header) in enumerate(headers.items()):
        block = 0
        for entry in header.entries:
            if part := entry.part:
                if tensors.setdefault(part.name, part.info) != part.info:
                    raise _differs(name, part.name, tensors[part.name], part.info)
                number = numbers.setdefault(part.name, len(numbers))
                offset = header.num_bytes + entry.offset
                rows.append((number, part.start, part.stop, file, offset, entry.num_bytes, block))
            block += entry.num_blocks
    return index_of_rows(tensors, list(headers), rows, [header.table_offset for header in headers.values()])


def index_of_rows(
    tensors: dict[str, TensorInfo],
    files: Sequence[str],
    rows: Sequence[tuple[int, int, int, int, int, int, int]],
    table_offsets: Sequence[int],
) -> PartIndex:
    """An index of parts in any order.

    Args:
        tensors: name -> whole tensor.
        files: their names.
        rows: of each part: tensor, start, stop, file, offset, length, first checksum.
        table_offsets: per file.
    """
    columns = np.array(rows, dtype=np.int64).reshape(-1, 7).T
    return sorted_index(
        PartIndex(
            tensors=tensors,
            files=tuple(files),
            ranges=Ranges(columns[0].astype(np.int32), columns[1].copy(), columns[2].copy()),
            file=columns[3].astype(np.int32),
            offset=columns[4].copy(),
            length=columns[5].copy(),
            block=columns[6].copy(),
            table_offset=np.array(table_offsets, dtype=np.int64),
        )
    )


def combine(indexes: Sequence[PartIndex]) -> PartIndex:
    """One index of several that are of different files of one checkpoint.

    Raises CheckpointError if two tell one tensor differently.
    """
    tensors: dict[str, TensorInfo] = {}
    numbers: dict[str, int] = {}
    tensor, file, num_files = [], [], 0
    for index in indexes:
        for name, info in index.tensors.items():
            if tensors.setdefault(name, info) != info:
                raise _differs(index.files[0], name, tensors[name], info)
            numbers.setdefault(name, len(numbers))
        renumbered = np.array([numbers[name] for name in index.tensors], dtype=np.int32)
        tensor.append(renumbered[index.ranges.tensor])
        file.append(index.file + np.int32(num_files))
        num_files += len(index.files)
    return sorted_index(
        PartIndex(
            tensors=tensors,
            files=tuple(name for index in indexes for name in index.files),
            ranges=Ranges(
                np.concatenate(tensor),
                np.concatenate([index.ranges.start for index in indexes]),
                np.concatenate([index.ranges.stop for index in indexes]),
            ),
            file=np.concatenate(file),
            offset=np.concatenate([index.offset for index in indexes]),
            length=np.concatenate([index.length for index in indexes]),
            block=np.concatenate([index.block for index in indexes]),
            table_offset=np.concatenate([index.table_offset for index in indexes]),
        )
    )


def check_complete(index: PartIndex) -> None:
    """Raise CheckpointError unless every element of every tensor is stored exactly once."""
    try:
        check_covered(index.ranges, index.numels, index.names)
    except CoverageError as error:
        raise CheckpointError(f"{error} in the checkpoint's files") from error


def sorted_index(index: PartIndex) -> PartIndex:
    """Tensors by name, parts by tensor and start."""
    names = sorted(index.tensors)
    place = {name: number for number, name in enumerate(names)}
    renumbered = np.array([place[name] for name in index.tensors], dtype=np.int32)
    tensor = renumbered[index.ranges.tensor] if len(index) else index.ranges.tensor
    order = np.lexsort((index.ranges.stop, index.ranges.start, tensor))
    return PartIndex(
        tensors={name: index.tensors[name] for name in names},
        files=index.files,
        ranges=Ranges(tensor, index.ranges.start, index.ranges.stop).take(order),
        file=index.file[order],
        offset=index.offset[order],
        length=index.length[order],
        block=index.block[order],
        table_offset=index.table_offset,
    )


def _differs(file: str, name: str, known: TensorInfo, found: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name} is of {found.dtype} and {list(found.shape)}, "
        f"but another file has {known.dtype} and {list(known.shape)}: they are not of one checkpoint"
    )
