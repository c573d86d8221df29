"""Reads units in this process."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from k25_train.data.batch import MicroBatchAssembler
from k25_train.data.decode.media import MediaPatches, Wanted
from k25_train.data.formats.reader import Files
from k25_train.data.readable_source import ReadableSource
from k25_train.data.storage.ranges import Range
from k25_train.data.units import MediaGroup, Result, Unit, WordsUnit


class UnitsHere:
    """Reads, tokenises and decodes what units ask for."""

    def __init__(self, sources: Mapping[str, ReadableSource], assembler: MicroBatchAssembler) -> None:
        """`sources` by name; `assembler` makes micro-batches of them."""
        self._sources = sources
        self._assembler = assembler

    def read(self, unit: Unit) -> Result:
        """What a unit asks for. Raises as `DataLoader.micro_batches`."""
        # Sources of one shard set share its reader.
        planned: dict[Files, list[Range]] = {}
        for name, each in unit.stretches():
            planned.setdefault(self._sources[name].reader, []).append(each)
        for reader, ranges in planned.items():
            reader.plan(ranges)
        if isinstance(unit, WordsUnit):
            return self._assembler.assemble(unit.sequences, unit.reads)
        if isinstance(unit, MediaGroup):
            return tuple(self._read_group(unit))
        return self._sources[unit.source].media_reader.load(unit.media, unit.positions)

    def _read_group(self, group: MediaGroup) -> Iterator[MediaPatches]:
        """Neighbours of one source are decoded together."""
        for name, units in groupby(group.units, key=lambda unit: unit.source):
            wanted = [Wanted(unit.media, unit.positions) for unit in units]
            yield from self._sources[name].media_reader.load_all(wanted)
