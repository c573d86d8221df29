"""What every format gives to readers of samples: bytes of media, and tokens of a stretch of a text."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from k25_train.data.byte_cache import ByteCache
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError, Words
from k25_train.data.formats.texts import TextTokens
from k25_train.data.storage.ranges import Range
from k25_train.data.tokenizer import Tokenizer

PARSED_CHARACTERS = 2**24
"""What samples that were parsed last may have: their segments are asked for one by one. Our choice."""


class SourceReader(Protocol):
    """Reads the samples of one source at random. Safe across threads and forks."""

    @property
    def directory(self) -> str:
        """Folder or URL that its shards' names start from, for messages."""

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of a shard from `offset`. Raises DataError if they are not there or cannot be read."""

    def segment_tokens(self, record: SampleRecord, segment: int, start: int, stop: int) -> Sequence[int]:
        """Tokens `start` to `stop` of the text that is a sample's segment.

        Raises SampleError if the words cannot be used or are not those indexed, and DataError as `read`.
        """

    def plan(self, ranges: Iterable[Range]) -> None:
        """Say which stretches of shards will be read next: of an object store neighbours come together."""

    def words(self, record: SampleRecord) -> Sequence[Words]:
        """A sample's words by segment; none where the format has no way to declare what they say of pictures.

        Raises as `segment_tokens`.
        """

    def close(self) -> None:
        """Make a read that waits to try again fail at once."""


class Files(Protocol):
    """Where a reader has its bytes from."""

    @property
    def directory(self) -> str:
        """Folder or URL."""

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """Part of a file."""

    def plan(self, ranges: Iterable[Range]) -> None:
        """See `SourceReader`."""

    def close(self) -> None:
        """End waiting."""


class WordsReader:
    """A `SourceReader` of a format that stores words: tokenizes the stretches asked for."""

    def __init__(
        self, files: Files, read_words: Callable[[SampleRecord], Sequence[Words]], tokenizer: Tokenizer
    ) -> None:
        """`read_words`: a sample's words by segment; raises SampleError. `tokenizer` must be the index's."""
        self._files = files
        self._read_words = read_words
        self._texts = TextTokens(tokenizer)
        self._words = ByteCache[Sequence[Words]](PARSED_CHARACTERS, _num_characters)

    @property
    def directory(self) -> str:
        """See `SourceReader`."""
        return self._files.directory

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """See `SourceReader`."""
        return self._files.read(shard, offset, num_bytes)

    def plan(self, ranges: Iterable[Range]) -> None:
        """See `SourceReader`."""
        self._files.plan(ranges)

    def segment_tokens(self, record: SampleRecord, segment: int, start: int, stop: int) -> Sequence[int]:
        """See `SourceReader`."""
        words = self.words(record)[segment]
        expected = record.segments[segment]
        if not isinstance(expected, TextSegment):
            raise SampleError(f"its segment {segment} is an image or a video")
        if (start, stop) == (0, expected.num_tokens):
            return self._texts.whole(words, expected.num_tokens)
        return self._texts.stretch(record, segment, words, expected.num_tokens, start, stop)

    def words(self, record: SampleRecord) -> Sequence[Words]:
        """See `SourceReader`."""
        return self._words.get((record.shard, record.offset), lambda: self._read_words(record))

    def close(self) -> None:
        """See `SourceReader`."""
        self._files.close()


def _num_characters(words: Sequence[Words]) -> int:
    return sum(len(each.text) for each in words)
