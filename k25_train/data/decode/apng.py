"""Frames of an animated PNG, composed as its specification (PNG third edition, section 13) says.

Pillow pastes where the format blends, which leaves half-transparent pixels too thin, and clears opaque
pictures to black instead of transparent.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from k25_train.data.decode.picture_colour import PictureFile, split_alpha
from k25_train.errors import DataError

_HEAD = b"\x89PNG\r\n\x1a\n"
_SHARED = (b"PLTE", b"tRNS")
"""Chunks that every frame is decoded with; those of colour apply to what is composed."""
_GREY_TYPES = (0, 4)
_CLEAR, _RESTORE = 1, 2
_OVER = 1


@dataclass(slots=True)
class _Part:
    """What one frame paints."""

    width: int
    height: int
    left: int
    top: int
    delay_ms: float
    disposal: int
    blend: int
    pixels: list[bytes] = field(default_factory=list)
    """Its compressed data."""


def is_apng(data: bytes) -> bool:
    """Whether a file is a PNG that says it is animated."""
    if not data.startswith(_HEAD):
        return False
    at = data.find(b"acTL", 0, max(data.find(b"IDAT"), 0))
    return at >= 0 and data[at + 4 : at + 8] != bytes(4)


def apng_frames(data: bytes) -> Iterator[tuple[Image.Image, float]]:
    """Each frame as RGBA or LA, valid until the next one is requested, and its delay in ms.

    Raises DataError, ValueError, struct.error or Pillow's errors for a damaged file.
    """
    header, shared, parts = _parse(data)
    width, height = struct.unpack_from(">II", header)
    canvas = Image.new("RGBA", (width, height))
    for number, part in enumerate(parts):
        box = (part.left, part.top, part.left + part.width, part.top + part.height)
        if not (part.width and part.height and box[2] <= width and box[3] <= height):
            raise DataError(f"has a frame at {box}, beyond its {width}x{height} pixels")
        before = canvas.copy() if part.disposal == _RESTORE and number else canvas
        picture = _picture(part, header, shared)
        if part.blend == _OVER:
            picture = Image.alpha_composite(canvas.crop(box), picture)
        canvas.paste(picture, box)
        yield canvas.convert("LA") if header[9] in _GREY_TYPES else canvas, part.delay_ms
        if part.disposal == _CLEAR or (part.disposal == _RESTORE and not number):
            canvas.paste((0, 0, 0, 0), box)
        canvas = before


def _parse(data: bytes) -> tuple[bytes, bytes, list[_Part]]:
    """The header, chunks that all frames share, and the frames."""
    header, shared = b"", b""
    parts: list[_Part] = []
    num_frames = sequence = 0
    for kind, content in _chunks(data):
        if kind in (b"fcTL", b"fdAT"):
            if struct.unpack_from(">I", content) != (sequence,):
                raise ValueError(f"chunk {sequence} of the animation is not where it belongs")
            sequence += 1
        if kind == b"IHDR":
            header = content
        elif kind == b"acTL":
            (num_frames,) = struct.unpack_from(">I", content)
        elif kind in _SHARED:
            shared += _chunk(kind, content)
        elif kind == b"fcTL":
            width, height, left, top, delay, per_s, *rest = struct.unpack(">IIIIHHBB", content[4:])
            parts.append(_Part(width, height, left, top, 1000 * delay / (per_s or 100), *rest))
        elif kind == b"IDAT" and parts:  # without a frame before, it is for programs that show no animation
            parts[0].pixels.append(content)
        elif kind == b"fdAT":
            parts[-1].pixels.append(content[4:])
    if len(parts) != num_frames:
        raise ValueError(f"states {num_frames} frames and has {len(parts)}")
    return header, shared, parts


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, kind = len(_HEAD), b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + size]
        if struct.unpack_from(">I", data, at + 8 + size) != (zlib.crc32(kind + content),):
            raise ValueError(f"its chunk {kind!r} is damaged")
        yield kind, content
        at += 12 + size


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _picture(part: _Part, header: bytes, shared: bytes) -> Image.Image:
    """What a frame paints, as RGBA."""
    size = struct.pack(">II", part.width, part.height)
    chunks = (_chunk(b"IHDR", size + header[8:]), shared, _chunk(b"IDAT", b"".join(part.pixels)))
    file = b"".join((_HEAD, *chunks, _chunk(b"IEND", b"")))
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        image.load()
        colours, alpha = split_alpha(image, PictureFile(file, legacy=False))
    rgba = colours.convert("RGBA")
    if alpha is not None:
        rgba.putalpha(alpha)
    return rgba
