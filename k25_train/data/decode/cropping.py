"""The part of a picture that its container shows: `clap` in MP4 and QuickTime, PixelCrop in Matroska.

Decoders apply the cropping that a codec states, not that of the container, which PyAV does not give out.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from k25_train.errors import DataError

_TO_SAMPLE_ENTRIES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
_FULL_BOX_BYTES, _VISUAL_ENTRY_BYTES = 8, 78
_EBML, _SEGMENT, _TRACKS, _TRACK, _VIDEO = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0xE0
_CROPS = (0x54CC, 0x54BB, 0x54DD, 0x54AA)
"""PixelCropLeft, -Top, -Right and -Bottom."""


@dataclass(frozen=True, slots=True)
class Cropping:
    """Lines and columns that are not shown."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge of what is shown. Raises DataError if nothing is."""
        left, top, right, bottom = self.left, self.top, width - self.right, height - self.bottom
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DataError(f"is cropped to nothing, or beyond its {width}x{height} pixels, by its container")
        return left, top, right, bottom


NOTHING_CROPPED = Cropping()


def container_cropping(data: bytes) -> Cropping:
    """What the container crops of its video; of several tracks that of the first one that says so."""
    found = _of_matroska(data) if data.startswith(_EBML.to_bytes(4)) else _of_mp4(data)
    return next(found, NOTHING_CROPPED)


def _of_mp4(data: bytes) -> Iterator[Cropping]:
    for entries in _boxes_at(memoryview(data), _TO_SAMPLE_ENTRIES):
        for _, entry in _boxes(entries[_FULL_BOX_BYTES:]):
            for name, content in _boxes(entry[_VISUAL_ENTRY_BYTES:]):
                if name == b"clap" and len(content) >= 32:
                    width, height = struct.unpack_from(">HH", entry, 24)
                    yield _of_clean_aperture(struct.unpack_from(">IIIIiIiI", content), width, height)


def _of_clean_aperture(values: Sequence[int], width: int, height: int) -> Cropping:
    """By ISO/IEC 14496-12, 12.1.4: size of the aperture, and where its centre is from the picture's."""
    if 0 in values[1::2]:
        return NOTHING_CROPPED
    shown_width, shown_height, right_of, below = (
        Fraction(values[at], values[at + 1]) for at in range(0, 8, 2)
    )
    left, top = (width - shown_width) / 2 + right_of, (height - shown_height) / 2 + below
    edges = (left, top, width - left - shown_width, height - top - shown_height)
    return Cropping(*(round(edge) for edge in edges))


def _boxes_at(data: memoryview, path: Sequence[bytes]) -> Iterator[memoryview]:
    if not path:
        yield data
        return
    for name, content in _boxes(data):
        if name == path[0]:
            yield from _boxes_at(content, path[1:])


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        size, head = int.from_bytes(data[at : at + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        size = size or len(data) - at
        if size < head:
            return
        yield bytes(data[at + 4 : at + 8]), data[at + head : at + size]
        at += size


def _of_matroska(data: bytes) -> Iterator[Cropping]:
    for segment in _elements(memoryview(data), _SEGMENT):
        for tracks in _elements(segment, _TRACKS):
            for track in _elements(tracks, _TRACK):
                for video in _elements(track, _VIDEO):
                    values = [next(_elements(video, crop), memoryview(b"")) for crop in _CROPS]
                    yield Cropping(*(int.from_bytes(value) for value in values))


def _elements(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Contents of the elements with this identifier (RFC 8794)."""
    at = 0
    while at < len(data):
        id_bytes = 9 - data[at].bit_length()
        size_at = at + id_bytes
        if id_bytes > 8 or size_at >= len(data):
            return
        size_bytes = 9 - data[size_at].bit_length()
        start = size_at + size_bytes
        if size_bytes > 8 or start > len(data):
            return
        size = int.from_bytes(data[size_at:start]) - (1 << 7 * size_bytes)
        is_unknown = size == (1 << 7 * size_bytes) - 1
        end = len(data) if is_unknown else start + size
        if int.from_bytes(data[at:size_at]) == wanted:
            yield data[start:end]
        at = end
