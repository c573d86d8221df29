"""GIFs are composed as browsers do: what no frame covers is transparent, not of the background colour."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageSequence

from k25_train.data.decode.frames import DecoderErrors, decode_frames, probe_media
from k25_train.errors import DataError

BLUE, RED, GREEN, WHITE = (0, 0, 255), (255, 0, 0), (0, 255, 0), (255, 255, 255)
KEEP, CLEAR, RESTORE = 1, 2, 3
COLOURS = bytes([*BLUE, *RED, *GREEN, 0, 0, 0])
CLEAR_CODE, CODE_BITS = 4, 3


def painted(
    box: tuple[int, int, int, int],
    colour: int,
    disposal: int,
    transparent: int | None = None,
    *,
    own_colours: bytes = b"",
) -> bytes:
    """A frame of one colour at (left, top, width, height), shown for 100 ms."""
    # 1. Codes that never grow: the dictionary is emptied before every second pixel.
    codes = [code for _ in range(box[2] * box[3] // 2) for code in (CLEAR_CODE, colour, colour)]
    bits = sum(code << CODE_BITS * i for i, code in enumerate([*codes, CLEAR_CODE + 1]))
    pixels = bits.to_bytes(-(-CODE_BITS * (len(codes) + 1) // 8), "little")
    assert len(pixels) < 256
    # 2. Control block, place, own colours, pixels.
    flags = disposal << 2 | (transparent is not None)
    control = b"\x21\xf9\x04" + struct.pack("<BHBB", flags, 10, transparent or 0, 0)
    place = b"\x2c" + struct.pack("<HHHHB", *box, 0x81 if own_colours else 0)
    return control + place + own_colours + bytes([2, len(pixels)]) + pixels + b"\0"


def gif(*frames: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    """A file whose background colour is blue."""
    return b"GIF89a" + struct.pack("<HHBBB", *size, 0x81, 0, 0) + COLOURS + b"".join(frames) + b";"


def corners(data: bytes, media_type: str = "video") -> list[list[object]]:
    """Colours near the upper left, in the middle and near the lower right of every frame."""
    with DecoderErrors():
        pictures = (frame.to_rgb() for frame in decode_frames(data, media_type, "gif"))
        return [[picture.getpixel((at, at)) for at in (1, 5, 7)] for picture in pictures]


SCREEN, UPPER, LOWER = (0, 0, 8, 8), (0, 0, 4, 4), (4, 4, 4, 4)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        pytest.param(
            [painted(UPPER, 1, KEEP), painted(LOWER, 2, KEEP)],
            [[RED, WHITE, WHITE], [RED, GREEN, GREEN]],
            id="the first frame covers a part",
        ),
        pytest.param(
            [painted(SCREEN, 1, CLEAR), painted(UPPER, 2, CLEAR), painted(LOWER, 2, KEEP)],
            [[RED, RED, RED], [GREEN, WHITE, WHITE], [WHITE, GREEN, GREEN]],
            id="frames clear what they covered",
        ),
        pytest.param(
            [
                painted(SCREEN, 1, KEEP),
                painted(UPPER, 2, RESTORE),
                painted(LOWER, 2, 4),
                painted(UPPER, 0, 0),
            ],
            [[RED, RED, RED], [GREEN, RED, RED], [RED, GREEN, GREEN], [BLUE, RED, RED]],
            id="frames give back what they covered",
        ),
        pytest.param(
            [painted(SCREEN, 1, KEEP), painted(SCREEN, 2, KEEP, transparent=2)],
            [[RED, RED, RED], [RED, RED, RED]],
            id="transparent pixels show what was there",
        ),
        pytest.param(
            [painted(SCREEN, 1, KEEP), painted((4, 4, 6, 6), 2, CLEAR), painted(UPPER, 0, KEEP)],
            [[RED, RED, RED], [RED, GREEN, GREEN], [BLUE, WHITE, WHITE]],
            id="a frame reaches beyond the screen",
        ),
        pytest.param(
            [painted(SCREEN, 1, KEEP), painted(LOWER, 1, KEEP, own_colours=COLOURS[::-1])],
            [[RED, RED, RED], [RED, GREEN, GREEN]],
            id="a frame has its own colours",
        ),
    ],
)
def test_frames_are_composed_as_in_a_browser(frames: list[bytes], expected: list[list[object]]) -> None:
    assert corners(gif(*frames)) == expected
    assert corners(gif(*frames), "image") == expected[:1]


def test_a_first_frame_larger_than_the_screen_makes_it_grow() -> None:
    info = probe_media(gif(painted((0, 0, 10, 8), 1, KEEP)), "video", "gif")
    assert (info.width, info.height, info.frame_times) == (10, 8, "1/10 1")


def test_a_screen_too_large_for_memory_is_refused() -> None:
    data = gif(painted((0, 0, 1, 2), 1, KEEP), size=(65535, 65535))
    with pytest.raises(DataError, match=r"65535x65535 pixels|DecompressionBomb"):
        corners(data)
    with pytest.raises(DataError, match="65535x65535 pixels"):
        corners(data, "image")


@pytest.mark.parametrize("media_type", ["image", "video"])
def test_a_file_without_a_frame_is_refused(media_type: str) -> None:
    with pytest.raises(DataError, match=r"has no picture|does not decode|has no frames"):
        probe_media(gif(), media_type, "gif")


def test_pillows_own_files_look_as_pillow_shows_them() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 4), dtype=np.uint8)
    noise[..., 3] = np.where(noise[..., 3] > 100, 255, 0)
    first, *others = [Image.fromarray(frame) for frame in noise]
    file = io.BytesIO()
    first.save(
        file, "gif", save_all=True, append_images=others, duration=[50, 60, 70, 80, 90, 100], disposal=2
    )
    frames = [np.asarray(frame.to_rgb()).copy() for frame in decode_frames(file.getvalue(), "video", "gif")]
    with Image.open(file) as image:
        for shown, frame in zip(frames, ImageSequence.Iterator(image), strict=True):
            rgba = frame.convert("RGBA")
            page = Image.new("RGB", rgba.size, "white")
            page.paste(rgba, mask=rgba)
            np.testing.assert_array_equal(shown, np.asarray(page))
    assert probe_media(file.getvalue(), "video", "gif").frame_times == "1/100 5 6 7 8 9 10"
