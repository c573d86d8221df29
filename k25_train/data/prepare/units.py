"""Input files cut into units of work, each of which a worker turns into one part of the result."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k25_train.data.prepare.inputs import PARQUET, InputFile, total_bytes

UNIT_BYTES = 4 * 2**20
"""Input of a unit: seconds of work, so an interruption costs little and cores end together. Our choice."""
MAX_UNITS = 100_000
"""Units of a corpus beyond which they grow, so that the folder of parts stays usable. Our choice."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of an input file."""

    number: int
    """Position among all units, which is that of its documents in the result."""
    file: int
    """Position of its input file."""
    start: int
    """First byte of a text file, or first row group; a line belongs to the unit in which it begins."""
    stop: int
    """Byte or row group behind the last one."""
    num_bytes: int
    """How much of the input it is, for progress."""


def unit_size(files: Sequence[InputFile], at_least: int) -> int:
    """Bytes of input in a unit: the number of workers has no part in it, so the parts do not depend on it."""
    return max(at_least, -(-total_bytes(files) // MAX_UNITS))


def cut(files: Sequence[InputFile], unit_bytes: int) -> list[Unit]:
    """All units in order. A compressed file is one unit: it can only be read from its beginning."""
    units: list[Unit] = []
    for position, file in enumerate(files):
        for start, stop, num_bytes in _stretches(file, unit_bytes):
            units.append(Unit(len(units), position, start, stop, num_bytes))
    return units


def _stretches(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    if file.kind == PARQUET:
        yield from _runs_of_groups(file.group_bytes, unit_bytes)
    elif file.codec:
        yield 0, file.num_bytes, file.num_bytes
    else:
        for start in range(0, file.num_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.num_bytes)
            yield start, stop, stop - start


def _runs_of_groups(group_bytes: Sequence[int], unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Row groups in runs, each ended by the group with which it is large enough."""
    start = size = 0
    for position, num_bytes in enumerate(group_bytes, start=1):
        size += num_bytes
        if size >= unit_bytes or position == len(group_bytes):
            yield start, position, size
            start, size = position, 0
