"""Animated PNGs are composed as their specification says; FFmpeg, which does so, is the reference."""

import io
import struct
import zlib
from collections.abc import Iterator
from itertools import product

import av
import numpy as np
import pytest
from PIL import Image

from k25_train.data.decode.frames import DecoderErrors, decode_frames, probe_media
from k25_train.errors import DataError

SIZE = (12, 8)


def drawn(mode: str) -> list[Image.Image]:
    """Frames of rectangles that are opaque, half-transparent or absent."""
    generator = np.random.default_rng(5)
    frames = []
    for _ in range(5):
        frame = Image.new("RGBA", SIZE)
        for opacity in (255, 128, 60):
            left, top = (int(generator.integers(0, side - 3)) for side in SIZE)
            colour = (*(int(value) for value in generator.integers(0, 256, 3)), opacity)
            frame.paste(colour, (left, top, left + 5, top + 4))
        frames.append(frame.convert(mode))
    return frames


def apng(frames: list[Image.Image], disposal: int, blend: int, *, has_still: bool = False) -> bytes:
    file = io.BytesIO()
    rest = frames if has_still else frames[1:]
    durations = [50 * (number + 1) for number in range(len(frames))]
    frames[0].save(
        file,
        "PNG",
        save_all=True,
        append_images=rest,
        duration=durations,
        disposal=disposal,
        blend=blend,
        default_image=has_still,
    )
    return file.getvalue()


def by_ffmpeg(data: bytes) -> Iterator[np.ndarray]:
    with av.open(io.BytesIO(data), format="apng") as container:
        for frame in container.decode(video=0):
            picture = Image.fromarray(frame.to_ndarray(format="rgba"))
            page = Image.new("RGB", picture.size, "white")
            page.paste(picture, mask=picture)
            yield np.asarray(page).astype(int)


def as_read(data: bytes) -> Iterator[np.ndarray]:
    with DecoderErrors():
        for frame in decode_frames(data, "video", "png"):
            yield np.asarray(frame.to_rgb()).astype(int)


@pytest.mark.parametrize(
    ("mode", "disposal", "blend"),
    [
        *product(("RGBA", "LA", "P"), (0, 1, 2), (0, 1)),
        # FFmpeg clears opaque pictures to black.
        *product(("RGB", "L"), (0,), (0, 1)),
    ],
)
def test_frames_are_composed_as_specified(mode: str, disposal: int, blend: int) -> None:
    data = apng(drawn(mode), disposal, blend)
    found, expected = list(as_read(data)), list(by_ffmpeg(data))
    assert len(found) == len(expected) > 1
    for frame, reference in zip(found, expected, strict=True):
        assert abs(frame - reference).max() <= 3


def test_half_transparent_pixels_lie_over_those_below() -> None:
    red, blue = Image.new("RGBA", SIZE, (255, 0, 0, 255)), Image.new("RGBA", SIZE, (0, 0, 255, 128))
    *_, last = as_read(apng([red, blue], 0, 1))
    assert last[0, 0].tolist() == [127, 0, 128]


def test_an_opaque_frame_clears_to_transparent() -> None:
    red, blue = Image.new("RGB", SIZE, "red"), Image.new("RGB", SIZE, "red")
    blue.paste("blue", (0, 0, 4, 4))
    *_, last = as_read(apng([red, blue], 1, 0))
    assert last[0, 0].tolist() == [0, 0, 255]
    assert last[-1, -1].tolist() in ([255, 0, 0], [255, 255, 255])


def test_times_and_a_still_for_programs_without_animation() -> None:
    info = probe_media(apng(drawn("RGBA")[:3], 0, 0, has_still=True), "video", "png")
    assert info.num_frames == 3
    assert info.frame_times == "1/20 1 2 3"


def changed(data: bytes, kind: bytes, content: bytes) -> bytes:
    """The file with the start of its last such chunk replaced, and a checksum that fits."""
    at = data.rindex(kind)
    size = int.from_bytes(data[at - 4 : at])
    whole = kind + content + data[at + 4 + len(content) : at + 4 + size]
    return data[:at] + whole + struct.pack(">I", zlib.crc32(whole)) + data[at + 8 + size :]


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        pytest.param(b"acTL", struct.pack(">I", 9), "states 9 frames", id="frames missing"),
        pytest.param(b"fcTL", struct.pack(">I", 3), "not where it belongs", id="out of order"),
        pytest.param(b"fcTL", struct.pack(">IIII", 7, 12, 8, 5), "beyond its 12x8 pixels", id="outside"),
        pytest.param(b"fcTL", struct.pack(">II", 7, 0), "beyond its 12x8 pixels", id="empty"),
    ],
)
def test_damage_is_named(kind: bytes, content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        probe_media(changed(apng(drawn("RGBA"), 0, 0), kind, content), "video", "png")


def test_a_chunk_that_does_not_fit_its_checksum_is_damage() -> None:
    data = bytearray(apng(drawn("RGBA"), 0, 0))
    data[data.index(b"fdAT") + 10] ^= 1
    with pytest.raises(DataError, match="is damaged"):
        probe_media(bytes(data), "video", "png")
