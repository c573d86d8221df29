"""What is wrong with one file of a source: every item of its index is read, decoded and tokenised."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from k25_train.data.decode.media_faults import media_faults
from k25_train.data.formats.left_out import left_out_of
from k25_train.data.formats.reader import SourceReader
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.open_source import difference_of
from k25_train.errors import DataError


class Fault(NamedTuple):
    """Something that is not as it should be."""

    source: str
    shard: str
    key: str
    """Name of the sample; empty if it is the file as such."""
    offset: int
    """Where it begins in the file."""
    reason: str
    """Continues the sentence that names it."""

    def __str__(self) -> str:
        sample = f", sample {self.key} (byte {self.offset})" if self.key else ""
        return f"{self.source}: {self.shard}{sample}: {self.reason}"


class ShardCheck(NamedTuple):
    """What came of one file."""

    faults: list[Fault]
    num_items: int
    num_media: int
    num_bytes: int
    """Read from it."""
    keys: np.ndarray
    """[n] u64, a hash of each of its samples' names."""
    contents: np.ndarray
    """[n] u64, a hash of what the index knows of each one's words and media, their checksums included."""


def check_shard(
    source: str, files: SourceFiles, index: SourceIndex, reader: SourceReader, number: int
) -> ShardCheck:
    """Read all items that lie in one file of a source."""
    shard = index.shard(number)
    faults = [Fault(source, shard.name, "", 0, line) for line in left_out_of([shard])[1]]
    try:
        difference = difference_of(shard, files.info(shard.name))
    except DataError as error:
        difference = str(error)
    if difference:
        faults.append(Fault(source, shard.name, "", 0, difference))
    first, stop = index.items_in(number)
    keys, contents = np.zeros((2, stop - first), np.uint64)
    num_media = num_bytes = 0
    for item in range(first, stop):
        record = index.record(item)
        keys[item - first] = _hash(record.key.encode())
        contents[item - first] = _hash(repr(_content(record)).encode())
        num_media += len(record.media)
        num_bytes += record.num_bytes + sum(media.num_bytes for media in record.media)
        faults += [
            Fault(source, shard.name, record.key, record.offset, reason)
            for reason in _item_faults(record, reader)
        ]
    return ShardCheck(faults, stop - first, num_media, num_bytes, keys, contents)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _content(record: SampleRecord) -> list[object]:
    """Checksums and sizes, wherever the sample is."""
    return [record.num_bytes, record.crc32, *((each.num_bytes, each.crc32) for each in record.media)]


def _item_faults(record: SampleRecord, reader: SourceReader) -> Iterator[str]:
    for position, segment in enumerate(record.segments):
        try:
            if isinstance(segment, MediaSegment):
                data = reader.read(segment.shard, segment.offset, segment.num_bytes)
                place = f"its {segment.type} (.{segment.format} at byte {segment.offset})"
                yield from (f"{place} {fault}" for fault in media_faults(data, segment))
            else:
                reader.segment_tokens(record, position, 0, segment.num_tokens)
        except SampleError as error:
            yield error.reason
        except DataError as error:
            yield str(error)
