"""Frames of a GIF as browsers compose them.

Pillow paints what no frame covers, and what a frame clears behind itself, in the file's background colour
unless it states a transparent one; in every browser these areas are transparent.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from k25_train.errors import DataError

_HEADS = (b"GIF87a", b"GIF89a")
_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_CONTROL = 0xF9
_CLEAR = 2
_RESTORE = (3, 4)
"""4 is what some programs write where the format says 3; browsers take it so."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one frame paints."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom on the screen."""
    delay_ms: int
    disposal: int
    """What happens to the area afterwards."""
    file: bytes
    """A GIF of this part alone."""


def is_gif(data: bytes) -> bool:
    """Whether a file is a GIF."""
    return data.startswith(_HEADS)


def gif_frames(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """Each frame as RGBA, valid until the next one is requested, and its delay in ms.

    Raises DataError for a screen that is too large, and OSError or Pillow's errors for a damaged file.
    """
    canvas: Image.Image | None = None
    for part in _parts(data):
        if canvas is None:
            canvas = _screen(data, part.box)
        before = canvas.copy() if part.disposal in _RESTORE else canvas
        with Image.open(io.BytesIO(part.file), formats=("GIF",)) as image:
            picture = image.convert("RGBA")
        canvas.paste(picture, part.box[:2], mask=picture)
        yield canvas, part.delay_ms
        if part.disposal == _CLEAR:
            canvas.paste((0, 0, 0, 0), part.box)
        canvas = before


def _screen(data: bytes, first_box: tuple[int, int, int, int]) -> Image.Image:
    """An empty screen; one that is smaller than the first frame grows to hold it."""
    width, height = struct.unpack_from("<HH", data, 6)
    width, height = max(width, first_box[2]), max(height, first_box[3])
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or width * height):
        raise DataError(f"has {width}x{height} pixels, more than an image may have")
    return Image.new("RGBA", (width, height))


def _parts(data: bytes) -> Iterator[_Part]:
    # 1. The screen, and the colours of frames without their own.
    table, at = _table(data, data[10], 13)
    control = b""
    # 2. Blocks; one of control belongs to the image after it.
    while at < len(data) and data[at] != _TRAILER:
        kind = data[at]
        if kind == _EXTENSION:
            end = _end_of_blocks(data, at + 2)
            control = data[at:end] if data[at + 1] == _CONTROL else control
            at = end
        elif kind == _IMAGE:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            own_table, pixels_at = _table(data, flags, at + 10)
            at = _end_of_blocks(data, pixels_at + 1)
            colours = own_table or table
            size_code = (len(colours) // 3).bit_length() - 2 if colours else 0
            screen = struct.pack("<HHBBB", width, height, 0x80 | size_code if colours else 0, 0, 0)
            place = struct.pack("<BHHHHB", _IMAGE, 0, 0, width, height, flags & 0x40)
            pixels = data[pixels_at:at]
            file = b"".join((_HEADS[1], screen, colours, control, place, pixels, bytes([_TRAILER])))
            packed, delay = struct.unpack_from("<BH", control, 3) if len(control) >= 8 else (0, 0)
            yield _Part((left, top, left + width, top + height), 10 * delay, packed >> 2 & 7, file)
            control = b""
        else:
            at += 1  # as readers do with what is no block


def _table(data: bytes, flags: int, at: int) -> tuple[bytes, int]:
    """The colours at a place, if the flags say that there are any, and where they end."""
    end = at + 3 * (2 << (flags & 7)) if flags & 0x80 else at
    return data[at:end], end


def _end_of_blocks(data: bytes, at: int) -> int:
    """Behind the empty block that ends a row of blocks."""
    while at < len(data):
        size = data[at]
        at += 1 + size
        if size == 0:
            return at
    raise OSError("the file is cut short")
