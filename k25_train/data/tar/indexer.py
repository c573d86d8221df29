"""What an index knows of a tar shard: one pass over its bytes."""

from collections.abc import Callable, Collection, Iterator

from k25_train.data.decode.file_types import (
    FORMAT_OF_EXTENSION,
    media_info,
    media_type_of_extension,
    sniff,
)
from k25_train.data.formats.index import bytes_crc32
from k25_train.data.formats.records import MediaSegment, SampleRecord, Segment, TextSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.tar.headers import Member, ReadAt, TarError, scan_members
from k25_train.data.tar.layouts import AllMedia, Layout, Text, extension_of, place_media
from k25_train.data.tar.members import Group, Skip, groups
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

MAX_MEMBER_BYTES = 2**32 - 1
"""Of a media file, and of what lies between the first and the last word of a sample."""
_LONG_TEXT = 2**20
"""Characters from which on a text is counted part by part, so that it takes no memory to speak of."""


class TarIndexer:
    """Goes through one shard. What cannot be used is a `Skip`, each with its place and reason."""

    def __init__(
        self,
        shard: str,
        read_at: ReadAt,
        num_bytes: int,
        layout: Layout,
        tokenizer: Tokenizer,
        excluded: Collection[str] = (),
        probe: Callable[[bytes, str, str], object] | None = None,
    ) -> None:
        """`read_at` reads the shard's `num_bytes`; `excluded`: stems that are left out without a word;
        `probe(data, media type, format)` is called for each media file and may raise DataError."""
        self.shard = shard
        self._read_at, self._num_bytes = read_at, num_bytes
        self._layout, self._tokenizer, self._excluded = layout, tokenizer, excluded
        self._probe = probe
        self.num_renamed = 0
        """Media files of another format than their name says."""

    def __iter__(self) -> Iterator[SampleRecord | Skip]:
        """Samples and what is left out, in the shard's order."""
        seen: set[str] = set()
        lone: list[SampleRecord] = []
        has_media = False
        for found in self._groups():
            if isinstance(found, Skip):
                yield found
                continue
            if found.stem in self._excluded:
                continue
            try:
                if found.stem in seen:
                    raise SampleError("has the stem of an earlier sample, whose members do not precede it")
                seen.add(found.stem)
                record, is_caption = self._record(found)
            except DataError as error:
                yield _skip(self.shard, found, getattr(error, "reason", str(error)))
                continue
            # Next to pictures with captions, a caption alone has lost its picture. Whether there are any may
            # show later than the first text.
            if record.media or self._layout.takes_lone_texts or not is_caption:
                has_media |= bool(record.media)
                yield record
            else:
                lone.append(record)
        for record in lone:
            reason = "is a text without an image or video, where others of its shard have one"
            yield Skip(self.shard, record.key, record.offset, reason) if has_media else record

    def _groups(self) -> Iterator[Group | Skip]:
        fault: TarError | None = None

        def members() -> Iterator[Member]:
            nonlocal fault
            try:
                yield from scan_members(self._read_at, self._num_bytes)
            except TarError as error:
                fault = error

        last: Group | None = None
        for group in groups(members()):
            if last is not None:
                yield last
            last = group
        # Of the sample that a cut goes through, members may be missing.
        is_within = fault is not None and fault.is_cut
        if last is not None:
            yield _skip(self.shard, last, "is the last of a shard that is cut short") if is_within else last
        if fault is not None:
            yield Skip(self.shard, "", fault.offset, fault.reason)

    def _read(self, group: Group, suffix: str) -> bytes:
        member = group.members[suffix]
        if member.num_bytes > MAX_MEMBER_BYTES:
            raise SampleError(f"has a member of {member.num_bytes} bytes, and an index holds less than 4 GiB")
        return self._read_at(member.offset, member.num_bytes)

    def _record(self, group: Group) -> tuple[SampleRecord, bool]:
        """A sample, and whether its text is that of all its media, as a caption is."""
        if group.twice:
            raise SampleError(f"has two members {group.twice}")
        # 1. Words, and the places of media between them.
        suffixes = tuple(group.members)
        words = self._layout.words_of(suffixes)
        media = [each for each in suffixes if media_type_of_extension(extension_of(each)) is not None]
        if not words:
            known = "no text" if media else "neither text nor media"
            raise SampleError(f"has {known} (.txt or .json) among {', '.join(suffixes)}")
        parts = self._layout.parts({suffix: self._read(group, suffix) for suffix in words})

        # 2. Sizes of both.
        segments: list[Segment] = []
        for part in place_media(parts, group.stem, media):
            if isinstance(part, Text):
                segments.append(TextSegment(num_tokens=self._count(part.text), loss=part.loss))
            else:
                segments.append(self._media(group, *part))
        if not any(isinstance(each, TextSegment) and each.num_tokens for each in segments):
            raise SampleError("its text is empty")

        # 3. Where the words are: from the first of their headers to the end of the last.
        first = min(group.members[suffix].start for suffix in words)
        num_bytes = max(group.members[suffix].end for suffix in words) - first
        if num_bytes > MAX_MEMBER_BYTES:
            raise SampleError(f"its words lie {num_bytes} bytes apart, and an index holds less than 4 GiB")
        types = {each.type for each in segments if isinstance(each, MediaSegment)}
        record = SampleRecord(
            shard=self.shard,
            key=group.stem,
            kind="video" if "video" in types else "caption" if types else "text",
            source="",
            offset=first,
            num_bytes=num_bytes,
            segments=tuple(segments),
            crc32=bytes_crc32(self._read_at(first, num_bytes)),
        )
        return record, any(isinstance(part, AllMedia) for part in parts)

    def _count(self, text: str) -> int:
        try:
            if len(text) >= _LONG_TEXT:
                return sum(self._tokenizer.part_tokens(text))
            return len(self._tokenizer.encode(text))
        except RuntimeError as error:
            raise SampleError(str(error)) from error

    def _media(self, group: Group, suffix: str, stated: str | None) -> MediaSegment:
        member, extension = group.members[suffix], extension_of(suffix)
        try:
            data = self._read(group, suffix)
            media_type, file_format = sniff(data, extension)
            self.num_renamed += file_format != FORMAT_OF_EXTENSION.get(extension, extension)
            # A moving picture is a still one, its first frame, unless the document calls it a video.
            is_animated = stated == "video" and file_format in ("gif", "webp", "png", "avif")
            media_type = "video" if is_animated else media_type
            wanted = stated or media_type_of_extension(extension)
            _check_type(media_type, file_format, wanted)
            info = media_info(data, media_type, file_format)
            if self._probe is not None:
                self._probe(data, media_type, file_format)
            return MediaSegment(
                type=media_type,
                shard=self.shard,
                offset=member.offset,
                num_bytes=member.num_bytes,
                format=file_format,
                width=info.width,
                height=info.height,
                num_frames=info.num_frames,
                duration_s=info.duration_s,
                frame_times=info.frame_times,
                crc32=bytes_crc32(data),
            )
        except (DataError, ValueError) as error:
            raise SampleError(f"its .{suffix} at byte {member.offset} {error}") from error


def _skip(shard: str, group: Group, reason: str) -> Skip:
    return Skip(shard, group.stem, min(member.start for member in group.members.values()), reason)


def _check_type(media_type: str, file_format: str, wanted: str | None) -> None:
    if media_type != wanted:
        raise DataError(f"is {_an(media_type)} ({file_format}), not {_an(str(wanted))}")


def _an(word: str) -> str:
    return f"an {word}" if word == "image" else f"a {word}"
