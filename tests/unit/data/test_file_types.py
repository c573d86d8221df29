"""What a file is by its bytes, and an image's size by its header, are what decoding finds."""

import io
import tracemalloc
from collections.abc import Callable

import pytest
from PIL import Image

from k25_train.data.decode.file_types import media_info, sniff
from k25_train.data.decode.frames import probe_media
from k25_train.errors import DataError
from tests.helpers.media_files import Clip, corners, image_bytes, png, png_chunk
from tests.helpers.tiny_shards import make_picture

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tiff", "AVIF": "avif", "GIF": "gif"}


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_by_header_are_those_of_decoding(name: str) -> None:
    picture = make_picture(40, 24, 3)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {"exif": exif} if orientation and name != "GIF" else {}
        data = image_bytes(picture, name, **options)

        assert sniff(data, "bin") == ("image", FORMATS[name])
        found = media_info(data, "image", FORMATS[name])
        assert found == probe_media(data, "image", FORMATS[name])
        is_turned = orientation in (5, 6, 7, 8) and name != "GIF"
        assert (found.width, found.height) == ((24, 40) if is_turned else (40, 24))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "RGBA", "CMYK"])
def test_sizes_of_other_colour_models(mode: str) -> None:
    picture = Image.new(mode, (31, 17))
    for name in ("TIFF", "JPEG" if mode in ("L", "CMYK") else "PNG" if mode != "CMYK" else "TIFF"):
        if (mode, name) == ("LA", "TIFF"):
            continue
        data = image_bytes(picture, name)
        assert media_info(data, "image", FORMATS[name]) == probe_media(data, "image", FORMATS[name])


def test_an_animation_is_its_first_frame() -> None:
    frames = [make_picture(32, 20, seed) for seed in range(3)]
    for name in ("GIF", "PNG", "WEBP", "AVIF"):
        data = image_bytes(frames[0], name, save_all=True, append_images=frames[1:])
        info = media_info(data, "image", FORMATS[name])
        assert (info.width, info.height, info.num_frames) == (32, 20, 1)
        assert info == probe_media(data, "image", FORMATS[name])


def test_a_turn_stated_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = png(8, 0, bytes(12), width=12)
    end = png_chunk(b"IEND", b"")
    data = data[: -len(end)] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end

    info = media_info(data, "image", "png")

    assert (info.width, info.height) == (8, 12)
    assert info == probe_media(data, "image", "png")


def test_containers() -> None:
    for container, extension in (("mp4", "mp4"), ("matroska", "mkv"), ("avi", "avi"), ("mov", "mov")):
        data = Clip(container=container).encode([corners(64, 48)])
        assert sniff(data, extension) == ("video", extension)
    assert sniff(b"\0" * 16, "h264") == ("video", "h264")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is no image: it begins with b'<html>404</h'"),
        (b'{"error": 1}', "is no image"),
    ],
)
def test_what_is_no_image_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        sniff(data, "jpg")


def huge_png() -> bytes:
    return png(8, 2, b"", width=100_000, height=100_000)


def huge_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "TIFF")
    width, height = (b"\x00\x01\x04\0\x01\0\0\0", b"\x01\x01\x04\0\x01\0\0\0")
    data = bytearray(buffer.getvalue())
    for tag in (width, height):
        position = data.find(tag)
        assert position > 0
        data[position + 8 : position + 12] = (100_000).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(("build", "name"), [(huge_png, "png"), (huge_tiff, "tiff")])
def test_a_decompression_bomb_costs_no_memory(build: Callable[[], bytes], name: str) -> None:
    """Pillow's bound is twice `Image.MAX_IMAGE_PIXELS`, 178,956,970 pixels, from the header alone."""
    data = build()
    tracemalloc.start()
    try:
        for read in (media_info, probe_media):
            with pytest.raises(DataError, match="DecompressionBombError"):
                read(data, "image", name)
        assert tracemalloc.get_traced_memory()[1] < 2**22 + 4 * len(data)
    finally:
        tracemalloc.stop()
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_one_by_twenty_thousand_pixels() -> None:
    data = image_bytes(Image.new("RGB", (1, 20_000)), "PNG")

    assert media_info(data, "image", "png") == probe_media(data, "image", "png")
