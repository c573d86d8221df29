"""Reading of shards at random, by offset."""

from collections.abc import Iterable

from k25_train.data.folder import DataFolder
from k25_train.data.formats.index import bytes_crc32
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.sample_json import SampleError, Words, parse_words
from k25_train.data.storage.ranges import Range
from k25_train.errors import DataError


def check_crc32(data: bytes, crc32: str) -> None:
    """Raises SampleError, with the reason alone, unless bytes are those indexed; "" checks nothing."""
    if crc32 and bytes_crc32(data) != crc32:
        raise SampleError(f"changed since it was indexed: its CRC-32 is {bytes_crc32(data)}, not {crc32}")


class ShardReader:
    """Ranged reads from the shards of one folder, safe across threads and forks."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        self.directory = folder.directory

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of `shard` from `offset`.

        Raises DataError if the shard ends before, or cannot be read (`storage/attempts.py`).
        """
        data = self.folder.read_range(shard, offset, num_bytes)
        if len(data) != num_bytes:
            raise DataError(
                f"{self.directory}/{shard}: bytes {offset} to {offset + num_bytes} were asked for and "
                f"{len(data)} are there; the shard was cut short while in use. Copy or build it again."
            )
        return data

    def plan(self, ranges: Iterable[Range]) -> None:
        """Say which stretches of shards will be read next: of an object store neighbours come together."""
        self.folder.plan(ranges)

    def close(self) -> None:
        """Make a read that waits to try again fail at once."""
        self.folder.close()

    def read_texts(self, record: SampleRecord) -> tuple[str, ...]:
        """The texts alone of `read_words`."""
        return tuple(words.text for words in self.read_words(record))

    def read_words(self, record: SampleRecord) -> tuple[Words, ...]:
        """The words of a sample's segments, by position; none for a media segment.

        Raises SampleError if the `.json` member is not what the index says is there, or its text is none.
        """
        data = self.read(record.shard, record.offset, record.num_bytes)
        try:
            # What is wrong with the words says more than that they changed.
            words = parse_words(data, record)
            check_crc32(data, record.crc32)
        except SampleError as error:
            place = f"{self.directory}/{record.shard}, sample {record.key}"
            raise SampleError(error.reason, place) from error
        return words
