"""Indexing of conversations: lines of a stretch of a file become items, or are told with a reason."""

from collections.abc import Iterator
from typing import NamedTuple

from k25_train.data.chat.chat_tokens import ChatDocument, ChatTokens, Stretch
from k25_train.data.chat.lines import MAX_LINE_BYTES, Line, lines, num_lines_before
from k25_train.data.chat.media_files import LINE_SUFFIXES, MediaFiles
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.folder import DataFolder
from k25_train.data.formats.index import bytes_crc32
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.errors import DataError


class Skipped(NamedTuple):
    """A line that is no conversation to learn from."""

    line: int
    """In its file, from 1 on."""
    reason: str
    """Continues the sentence that names file and line."""


class ChatIndexer:
    """Makes records of the conversations of one source."""

    def __init__(self, folder: DataFolder, tokens: ChatTokens, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._folder = folder
        self._tokens = tokens
        self._media = MediaFiles(folder)
        self._max_line_bytes = max_line_bytes

    def index(self, shard: str, start: int, stop: int) -> Iterator[SampleRecord | Skipped]:
        """The documents of lines of `shard` that begin in a stretch of its bytes, and the lines without any.

        Raises DataError for a file that has another name than JSON lines have, or cannot be read.
        """
        if not shard.endswith(LINE_SUFFIXES):
            raise DataError(
                f"{self._folder.path(shard)}: conversations are JSON lines, uncompressed, in files named "
                f"*{', *'.join(LINE_SUFFIXES)}. Rename or decompress it, or correct the source's path."
            )
        first = 0
        for line in lines(self._folder, shard, start, stop, self._max_line_bytes):
            try:
                yield from self._records(shard, line)
            except SampleError as error:
                first = first or 1 + num_lines_before(self._folder, shard, line.offset) - line.number
                yield Skipped(first + line.number, error.reason)

    def _records(self, shard: str, line: Line) -> tuple[SampleRecord, ...]:
        data = line.data
        if data is None:
            raise SampleError(
                f"is longer than {self._max_line_bytes} bytes, as much as a conversation may have"
            )
        if not data.strip():
            return ()
        documents = self._tokens.documents(parse_conversation(data))
        return tuple(self._record(shard, line.offset, data, document) for document in documents)

    def _record(self, shard: str, offset: int, data: bytes, document: ChatDocument) -> SampleRecord:
        segments = tuple(
            TextSegment(num_tokens=len(part.tokens), loss=part.learned)
            if isinstance(part, Stretch)
            else self._media.find(part, shard, data, offset)
            for part in document
        )
        has_media = any(isinstance(segment, MediaSegment) for segment in segments)
        return SampleRecord(
            shard=shard,
            key=str(offset),
            kind="caption" if has_media else "text",
            source="",
            offset=offset,
            num_bytes=len(data),
            segments=segments,
            crc32=bytes_crc32(data),
        )
