"""Media files with a chosen container, colour model, orientation or time stamps."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from k25_train.data.decode.frames import MediaInfo, decode_frames, probe_media
from k25_train.data.formats.records import MediaSegment

ONE = 1 << 16
"""1 in the upper part of a display matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A video to encode: one picture per time stamp."""

    container: str = "mp4"
    codec: str = "mpeg4"
    pixel_format: str = "yuv420p"
    stamps: Sequence[int] = tuple(range(3))
    """In units of `tick_s`."""
    tick_s: Fraction = Fraction(1, 30)
    rate: int = 30
    turn: tuple[int, int, int, int] | None = None
    """a, b, c, d of the display matrix, in whole numbers."""
    pixel_aspect: Fraction | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, int] = field(default_factory=dict)
    """Colour tags of the stream."""

    def encode(self, pictures: Sequence[Image.Image]) -> bytes:
        """The file; of fewer pictures than stamps the last one is repeated."""
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=self.container) as container:
            stream = container.add_stream(self.codec, rate=self.rate, options=dict(self.options))
            stream.width, stream.height = pictures[0].size
            stream.pix_fmt = self.pixel_format
            stream.time_base = stream.codec_context.time_base = self.tick_s
            for name, value in self.tags.items():
                setattr(stream.codec_context, name, value)
            if self.turn is not None:
                a, b, c, d = (ONE * value for value in self.turn)
                stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
            if self.pixel_aspect is not None:
                stream.codec_context.sample_aspect_ratio = self.pixel_aspect
            for number, stamp in enumerate(self.stamps):
                picture = pictures[min(number, len(pictures) - 1)]
                frame = av.VideoFrame.from_ndarray(
                    np.asarray(picture), format={"RGB": "rgb24", "RGBA": "rgba"}[picture.mode]
                )
                frame.pts, frame.time_base = stamp, self.tick_s
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return buffer.getvalue()


def corners(width: int, height: int) -> Image.Image:
    """Red, green, blue and yellow quarters, in reading order: every turn and mirroring looks different."""
    quarters = np.array([[(220, 30, 30), (30, 200, 30)], [(30, 30, 220), (220, 220, 40)]], dtype=np.uint8)
    return Image.fromarray(quarters).resize((width, height), Image.Resampling.NEAREST)


def first_picture(data: bytes, media_type: str, file_format: str) -> np.ndarray:
    """[H, W, 3] of the first frame as shown, not stretched."""
    frame = next(iter(decode_frames(data, media_type, file_format)))
    return np.asarray(frame.to_rgb())


def segment_of(data: bytes, media_type: str, file_format: str, info: MediaInfo | None = None) -> MediaSegment:
    """The index's view of a file that lies nowhere."""
    info = info or probe_media(data, media_type, file_format)
    return MediaSegment(
        type=media_type,
        shard="x.tar",
        offset=0,
        num_bytes=len(data),
        format=file_format,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        duration_s=info.duration_s,
        frame_times=info.frame_times,
    )


def image_bytes(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The image as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(depth: int, colour_type: int, row: bytes, *chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    """A PNG whose rows are all `row`, with `chunks` before its data."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = zlib.compress((b"\0" + row) * height)
    body = [png_chunk(b"IHDR", head), *chunks, png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(
    bits: int,
    photometric: int,
    data: bytes,
    *,
    order: str = "<",
    sample_format: int = 1,
    alpha: int | None = None,
) -> bytes:
    """An uncompressed grey TIFF of 8x8 pixels; with `alpha` as its tag ExtraSamples says a second sample."""
    num_samples = 1 if alpha is None else 2
    tags = [(256, (8,)), (257, (8,)), (258, (bits,) * num_samples), (259, (1,)), (262, (photometric,))]
    tags += [(273, (0,)), (277, (num_samples,)), (278, (8,)), (279, (len(data),))]
    tags += [] if alpha is None else [(338, (alpha,))]
    tags += [(339, (sample_format,) * num_samples)]
    data_offset = 8 + 2 + 12 * len(tags) + 4
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    entries = b""
    for tag, values in tags:
        values = (data_offset,) if tag == 273 else values
        content = struct.pack(f"{order}{len(values)}H", *values).ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, 3, len(values)) + content
    return head + entries + struct.pack(order + "I", 0) + data


def rgb_profile(name: str, gamma: float, to_xyz: np.ndarray) -> bytes:
    """An ICC profile (version 2) of three primaries, columns of `to_xyz` under D50, and a gamma."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * ONE) for value in values))

    text = name.encode() + b"\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    contents = {
        b"desc": described + bytes(-len(described) % 4),
        b"cprt": b"text" + bytes(4) + b"none" + bytes(4),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249),
    }
    for letter, column in zip((b"r", b"g", b"b"), to_xyz.T, strict=True):
        contents[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
        contents[letter + b"TRC"] = curve
    table, body = struct.pack(">I", len(contents)), b""
    start = 128 + 4 + 12 * len(contents)
    for tag, content in contents.items():
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head + bytes(128 - len(head)) + table + body
