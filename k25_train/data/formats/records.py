"""Samples as every part of the data path knows them, whatever format they are stored in.

A record says where a sample's bytes are and how large its texts and media are. Sizes are native (pixels,
frames, seconds, tokens), never model-dependent ones, so every rank can compute all patch grids and all
sequence lengths of a step without opening a data file, for any model's limits.
"""

from dataclasses import dataclass
from fractions import Fraction

from k25_train.data.formats.frame_times import FrameTimes

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Of an index. Version 1 has no checksums and no frame times, and gives videos the size they are coded in. It
still trains, decoded as it was meant: frames evenly spread in time, neither turned nor stretched, colours as
stored."""
MEDIA_TYPES = ("image", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSegment:
    """A stretch of text. Its words are in the sample's `.json` member, under the same segment position."""

    num_tokens: int
    """Length under the shard set's tokenizer, without any special token."""
    loss: bool
    """Whether its tokens are training targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSegment:
    """An image or a video, stored in its native file format."""

    type: str
    """`image` or `video`."""
    shard: str
    """File name of the shard that holds it."""
    offset: int
    """First byte of the file inside the shard."""
    num_bytes: int
    """Length of the file."""
    format: str
    """File extension without dot: png, jpg, webp, gif, mp4 …"""
    width: int
    """Width in square pixels as a viewer shows it: turned and stretched as the file says."""
    height: int
    """Height in square pixels as a viewer shows it."""
    num_frames: int
    """Frames in the file; 1 for an image."""
    duration_s: float
    """Length of the video in seconds, with the time that its last frame is shown; 0 for an image."""
    frame_times: str
    """When each frame of a video is shown, as `FrameTimes` writes it; empty for an image, and in an index of
    version 1, which has a video's frames evenly spread over the duration."""
    crc32: str = ""
    """Eight hexadecimal digits, CRC-32 of the file; empty, and not checked, in an index of version 1."""
    format_version: int = FORMAT_VERSION
    """Of the index, which says how the file is meant to be decoded."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no file has."""
        if min(self.width, self.height, self.num_frames) < 1 or not 0 <= self.duration_s < float("inf"):
            raise ValueError(f"impossible sizes: {self}")
        if self.type == "video" and not self.frame_times and self.format_version > 1:
            raise ValueError(f"a video needs frame_times, as probe_media finds them: {self}")
        if self.frame_times:
            times = FrameTimes.parse(self.frame_times)
            if (times.num_frames, times.duration_s) != (self.num_frames, self.duration_s):
                raise ValueError(f"frame_times have other frames or another length than it says: {self}")

    @property
    def times(self) -> FrameTimes:
        """When each frame of a video is shown."""
        if self.frame_times:
            return FrameTimes.parse(self.frame_times)
        return FrameTimes.even(self.num_frames, Fraction(self.duration_s) / self.num_frames or Fraction(1))


Segment = TextSegment | MediaSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """One sample as the index knows it."""

    shard: str
    """File name of the shard, relative to the shard set's directory."""
    key: str
    """Name of the sample, unique in its shard."""
    kind: str
    """One of `SAMPLE_KINDS`; all but `text` have at least one image or video."""
    source: str
    """Name of the source, as listed in `dataset.json`."""
    offset: int
    """First byte of the sample's `.json` member inside the shard."""
    num_bytes: int
    """Length of that member."""
    segments: tuple[Segment, ...]
    """Text and media in reading order."""
    crc32: str = ""
    """Eight hexadecimal digits, CRC-32 of that member; empty, and not checked, in an index of version 1."""

    @property
    def media(self) -> tuple[MediaSegment, ...]:
        """The images and videos among the segments, in order."""
        return tuple(segment for segment in self.segments if isinstance(segment, MediaSegment))

    @property
    def num_text_tokens(self) -> int:
        """Tokens in all text segments, without special tokens."""
        return sum(segment.num_tokens for segment in self.segments if isinstance(segment, TextSegment))
