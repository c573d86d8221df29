"""Reads words and media of tar shards at the places that an index has."""

from k25_train.data.folder import DataFolder
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError, Words
from k25_train.data.formats.shard_reader import ShardReader, check_crc32
from k25_train.data.tar.headers import TarError, scan_members
from k25_train.data.tar.layouts import Layout, Text, texts_of
from k25_train.data.tar.members import groups


class TarReader(ShardReader):
    """Ranged reads of tar shards of any layout, safe across threads and forks.

    A record's stretch of its shard begins with the header of a member: its words are found by the rule of its
    layout that found them when it was indexed.
    """

    def __init__(self, folder: DataFolder, layout: Layout) -> None:
        super().__init__(folder)
        self._layout = layout

    def read_words(self, record: SampleRecord) -> tuple[Words, ...]:
        """The words of a sample's segments, by position; none for a media segment.

        Raises SampleError if they are not what the index says is there.
        """
        data = self.read(record.shard, record.offset, record.num_bytes)
        try:
            texts = iter(self._texts(data, record))
            check_crc32(data, record.crc32)
        except SampleError as error:
            place = f"{self.directory}/{record.shard}, sample {record.key} (byte {record.offset})"
            raise SampleError(error.reason, place) from error
        return tuple(
            Words((text := next(texts)).text, text.part_tokens, text.declared)
            if isinstance(segment, TextSegment)
            else Words("", ())
            for segment in record.segments
        )

    def _texts(self, data: bytes, record: SampleRecord) -> list[Text]:
        def read_at(offset: int, num_bytes: int) -> bytes:
            return data[offset : offset + num_bytes]

        try:
            group = next(groups(scan_members(read_at, len(data), is_part=True)), None)
        except TarError as error:
            raise SampleError(f"no member where the index says ({error.reason})") from error
        members = {} if group is None else group.members
        chosen = self._layout.words_of(tuple(members))
        parts = self._layout.parts(
            {each: read_at(members[each].offset, members[each].num_bytes) for each in chosen}
        )
        texts = texts_of(parts)
        expected = [segment.loss for segment in record.segments if isinstance(segment, TextSegment)]
        if [text.loss for text in texts] != expected:
            raise SampleError(
                f"has {len(texts)} texts, the index says {len(expected)}; shard and index differ"
            )
        return texts
