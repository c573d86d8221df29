"""Micro-batches of one rank from units: words first, then the images and videos of each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from k25_train.data.batch import MicroBatch, MicroBatchAssembler, Reads
from k25_train.data.decode.media import MediaPatches
from k25_train.data.mix.plan import SequencePlan, media_of
from k25_train.data.skip_log import SkipLog
from k25_train.data.units import MediaUnit, Read, Unit, UnitReading, WordsUnit


def read_micro_batches(
    batches: Sequence[tuple[SequencePlan, ...]],
    reads: Reads,
    reading: UnitReading,
    assembler: MicroBatchAssembler,
    skip_log: SkipLog,
) -> Iterator[MicroBatch]:
    """The micro-batches of the given sequences, in order, with what `reads` asks for.

    A sample whose words or media cannot be used keeps its place: padding for words, black for pixels, and no
    loss. Raises DataError when those pass the limit of `skip_log`, or when a file cannot be read.
    """
    words = replace(reads, pixels=False)
    units: list[Unit] = []
    for sequences in batches:
        # Without words nothing is read for them.
        units += [WordsUnit(sequences, words)] if reads.words else []
        units += (
            [MediaUnit(source, media, None) for source, _, media in media_of(sequences)]
            if reads.pixels
            else []
        )
    found = reading.read(units)
    room = assembler.room_for(batches if reads.pixels else [])
    for number, sequences in enumerate(batches):
        if reads.words:
            read = next(found)
            for name, reason in read.skipped.items():
                skip_log.add_named(name, reason, log=True)
            assert isinstance(read.result, MicroBatch)
            batch = read.result
        else:
            batch = assembler.assemble(sequences, words)
        yield assembler.with_pixels(batch, sequences, _media(found), room[number]) if reads.pixels else batch


def _media(found: Iterator[Read]) -> Iterator[MediaPatches]:
    for read in found:
        assert isinstance(read.result, MediaPatches)
        yield read.result
