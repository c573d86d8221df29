"""Reading of conversations at random: the same rendering as when they were indexed."""

from collections.abc import Iterable, Sequence

from k25_train.data.byte_cache import ByteCache
from k25_train.data.chat.chat_tokens import ChatDocument, ChatTokens, Stretch
from k25_train.data.chat.media_files import LINE_SUFFIXES, embedded
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.formats.reader import Files
from k25_train.data.formats.records import MediaSegment, SampleRecord, Segment
from k25_train.data.formats.sample_json import SampleError, Words
from k25_train.data.formats.shard_reader import check_crc32
from k25_train.data.storage.ranges import Range

CACHED_BYTES = 2**26
"""What the conversations that were encoded last may take: their segments are asked for one by one."""
_TOKEN_BYTES = 36
"""Of one token, an int and its place in a tuple."""


class ChatReader:
    """A `SourceReader` of conversations. Safe across threads and forks."""

    def __init__(self, files: Files, tokens: ChatTokens) -> None:
        """`tokens` must be of the tokenizer that the index was counted with."""
        self._files = files
        self._tokens = tokens
        self._documents = ByteCache[ChatDocument](CACHED_BYTES, _num_bytes)

    @property
    def directory(self) -> str:
        """See `SourceReader`."""
        return self._files.directory

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """See `SourceReader`; what lies in a file of conversations is decoded from Base64."""
        data = self._files.read(shard, offset, num_bytes)
        return embedded(data) if shard.endswith(LINE_SUFFIXES) else data

    def segment_tokens(self, record: SampleRecord, segment: int, start: int, stop: int) -> Sequence[int]:
        """See `SourceReader`."""
        part = self._documents.get(record, lambda: self._read(record))[segment]
        if not isinstance(part, Stretch):
            raise SampleError(f"its segment {segment} is an image or a video")
        return part.tokens[start:stop]

    def plan(self, ranges: Iterable[Range]) -> None:
        """See `SourceReader`."""
        self._files.plan(ranges)

    def words(self, record: SampleRecord) -> Sequence[Words]:
        """See `SourceReader`: nothing is declared."""
        return ()

    def close(self) -> None:
        """See `SourceReader`."""
        self._files.close()

    def _read(self, record: SampleRecord) -> ChatDocument:
        """The document of a record; of a conversation with several, the one that has its segments."""
        line = self._files.read(record.shard, record.offset, record.num_bytes)
        try:
            # What is wrong with a conversation says more than that it changed.
            documents = self._tokens.documents(parse_conversation(line))
            check_crc32(line, record.crc32)
            return _chosen(documents, record.segments)
        except SampleError as error:
            place = f"{self.directory}/{record.shard}, conversation at byte {record.offset}"
            raise SampleError(error.reason, place) from error


def _chosen(documents: Sequence[ChatDocument], segments: Sequence[Segment]) -> ChatDocument:
    """The document with these segments; all differ, since what a later one teaches is further behind."""
    for document in documents:
        if len(document) == len(segments) and all(map(_is_of, document, segments)):
            return document
    raise SampleError("its tokens are not those that were indexed")


def _is_of(part: object, segment: Segment) -> bool:
    if isinstance(segment, MediaSegment):
        return not isinstance(part, Stretch)
    return isinstance(part, Stretch) and (len(part.tokens), part.learned) == (
        segment.num_tokens,
        segment.loss,
    )


def _num_bytes(document: ChatDocument) -> int:
    return sum(_TOKEN_BYTES * len(part.tokens) for part in document if isinstance(part, Stretch))
