"""Images of every depth and colour model look as in a viewer, or are refused with the reason."""

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from k25_train.data.decode.frames import probe_media
from k25_train.data.decode.items import plan_media
from k25_train.data.decode.patches import load_patches
from k25_train.errors import DataError
from tests.helpers.media_files import (
    first_picture,
    image_bytes,
    png,
    png_chunk,
    rgb_profile,
    segment_of,
    tiff,
)
from tests.helpers.tiny_shards import tiny_vision_config

WHITE = (255, 255, 255)


def grey16(image_format: str, **options: object) -> bytes:
    return image_bytes(Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), image_format, **options)


def plain(mode: str, colour: object, image_format: str = "PNG", **options: object) -> bytes:
    return image_bytes(Image.new(mode, (8, 8), colour), image_format, **options)  # type: ignore[arg-type]


def palette(transparency: object = None) -> bytes:
    image = Image.new("P", (8, 8), 3)
    image.putpalette([10, 20, 30] * 3 + [200, 100, 50] + [0, 0, 0] * 252)
    return image_bytes(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def trns(*values: int) -> bytes:
    return png_chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def big(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


PICTURES: dict[str, tuple[str, bytes, tuple[int, int, int]]] = {
    "16-bit grey PNG": ("png", grey16("PNG"), (128, 128, 128)),
    "16-bit grey TIFF": ("tiff", grey16("TIFF"), (128, 128, 128)),
    "16-bit grey TIFF, big-endian": ("tiff", tiff(16, 1, b"\x80\0" * 64, order=">"), (128, 128, 128)),
    "16-bit grey TIFF, white is 0": ("tiff", tiff(16, 0, b"\0\x40" * 64), (191, 191, 191)),
    "16-bit grey JPEG 2000": ("jp2", grey16("JPEG2000"), (128, 128, 128)),
    "16-bit PGM": ("pgm", b"P5 8 8 65535\n" + b"\x80\0" * 64, (128, 128, 128)),
    "10-bit PGM": ("pgm", b"P5 8 8 1023\n" + b"\x02\0" * 64, (128, 128, 128)),
    "16-bit PPM": ("ppm", b"P6 8 8 65535\n" + b"\x80\0\x40\0\x20\0" * 64, (128, 64, 32)),
    "12-bit TIFF": ("tiff", tiff(12, 1, b"\x80\x08\x00" * 32), (128, 128, 128)),
    "8-bit TIFF, white is 0": ("tiff", tiff(8, 0, b"\x37" * 64), (200, 200, 200)),
    "4-bit TIFF": ("tiff", tiff(4, 1, b"\x88" * 32), (136, 136, 136)),
    "16-bit grey PNG, transparent": ("png", png(16, 0, big(1000) * 8, trns(1000)), WHITE),
    "16-bit grey PNG, nearly the transparent grey": (
        "png",
        png(16, 0, big(0x8001) * 8, trns(0x8000)),
        (128,) * 3,
    ),
    "4-bit grey PNG, transparent": ("png", png(4, 0, b"\x55" * 4, trns(5)), WHITE),
    "2-bit grey PNG, transparent": ("png", png(2, 0, b"\xaa" * 2, trns(2)), WHITE),
    "1-bit grey PNG, black transparent": ("png", png(1, 0, b"\0", trns(0)), WHITE),
    "4-bit grey PNG, another grey transparent": ("png", png(4, 0, b"\x55" * 4, trns(6)), (85, 85, 85)),
    "8-bit RGB PNG, transparent": ("png", png(8, 2, bytes([9, 8, 7]) * 8, trns(9, 8, 7)), WHITE),
    "16-bit RGB PNG": ("png", png(16, 2, big(0x8000, 0x4000, 0x20FF) * 8), (128, 64, 32)),
    "16-bit RGBA PNG": ("png", png(16, 6, big(0x8000, 0x4000, 0x20FF, 0) * 8), WHITE),
    "16-bit grey and alpha PNG": ("png", png(16, 4, big(0x8000, 0xFFFF) * 8), (128, 128, 128)),
    "1-bit": ("png", plain("1", 1), WHITE),
    "palette": ("png", palette(), (200, 100, 50)),
    "palette, transparent index": ("png", palette(3), WHITE),
    "palette, alpha of each index": ("png", palette(bytes([0, 0, 0, 128])), (227, 177, 152)),
    "GIF, transparent": ("gif", plain("P", 3, "GIF", transparency=3), WHITE),
    "grey, transparent": ("png", plain("LA", (0, 0)), WHITE),
    "half transparent": ("png", plain("RGBA", (200, 0, 0, 128)), (227, 127, 127)),
    "half transparent WebP": (
        "webp",
        plain("RGBA", (200, 0, 0, 128), "WEBP", lossless=True),
        (227, 127, 127),
    ),
    "half transparent TIFF": ("tiff", plain("RGBA", (200, 0, 0, 128), "TIFF"), (227, 127, 127)),
    "premultiplied TIFF": ("tiff", tiff(8, 1, b"\x40\x80" * 64, alpha=1), (191, 191, 191)),
    "CMYK JPEG": ("jpg", plain("CMYK", (0, 255, 255, 0), "JPEG"), (255, 0, 0)),
    "CMYK TIFF": ("tiff", plain("CMYK", (0, 255, 255, 0), "TIFF"), (255, 0, 0)),
    "YCbCr TIFF": ("tiff", plain("YCbCr", (76, 85, 255), "TIFF"), (254, 0, 0)),
    "Lab TIFF, grey": ("tiff", plain("LAB", (137, 128, 128), "TIFF"), (128, 128, 128)),
    "JPEG": ("jpg", plain("RGB", (200, 100, 50), "JPEG", quality=95), (200, 100, 50)),
    "AVIF": ("avif", plain("RGB", (200, 100, 50), "AVIF", quality=95), (200, 100, 50)),
    "PNG of linear light": (
        "png",
        png(8, 2, bytes([55] * 24), png_chunk(b"gAMA", b"\0\x01\x86\xa0")),
        (127,) * 3,
    ),
    "PNG of the usual gamma": (
        "png",
        png(8, 2, bytes([55] * 24), png_chunk(b"gAMA", b"\0\0\xb1\x8f")),
        (55,) * 3,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_look_as_in_a_viewer(name: str) -> None:
    file_format, data, expected = PICTURES[name]

    info = probe_media(data, "image", file_format)
    shown = first_picture(data, "image", file_format)

    assert (info.width, info.height, info.num_frames) == (8, 8, 1)
    assert abs(shown.astype(int) - expected).max() <= 2


ADOBE_TO_XYZ = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
"""Primaries of Adobe RGB (1998) under D50, its annex C."""
SRGB_TO_XYZ = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
"""Primaries of sRGB under D50."""


def as_srgb(colour: tuple[int, int, int], gamma: float, to_xyz: np.ndarray) -> np.ndarray:
    linear = np.linalg.inv(SRGB_TO_XYZ) @ to_xyz @ (np.array(colour) / 255) ** gamma
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("colour", [(120, 160, 130), (200, 90, 60), (128, 128, 128)])
def test_colour_profiles_are_applied(image_format: str, colour: tuple[int, int, int]) -> None:
    profile = rgb_profile("Adobe RGB (1998)", 2.19921875, ADOBE_TO_XYZ)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}
    data = plain("RGB", colour, image_format, icc_profile=profile, **lossless.get(image_format, {}))

    shown = first_picture(data, "image", image_format.lower())

    np.testing.assert_allclose(shown[4, 4], as_srgb(colour, 2.19921875, ADOBE_TO_XYZ), atol=3)


def test_in_an_index_of_version_1_profiles_are_not_applied() -> None:
    vision = tiny_vision_config()
    profile = rgb_profile("Adobe RGB (1998)", 2.19921875, ADOBE_TO_XYZ)
    tagged = plain("RGB", (120, 160, 130), icc_profile=profile)
    now = segment_of(tagged, "image", "png")
    old = replace(now, format_version=1)
    untagged = plain("RGB", (120, 160, 130))

    shown, stored = (load_patches(tagged, plan_media(segment, vision), vision) for segment in (now, old))

    assert torch.equal(stored, load_patches(untagged, plan_media(now, vision), vision))
    assert not torch.equal(shown, stored)


def test_a_profile_leaves_transparency_white() -> None:
    profile = rgb_profile("Adobe RGB (1998)", 2.19921875, ADOBE_TO_XYZ)
    shown = first_picture(plain("RGBA", (120, 160, 130, 0), icc_profile=profile), "image", "png")

    assert (shown == 255).all()


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        rgb_profile("sRGB IEC61966-2.1", 2.2, SRGB_TO_XYZ)[:200],
        rgb_profile("sRGB", 2.2, SRGB_TO_XYZ),
    ],
)
def test_a_profile_that_is_broken_or_srgb_changes_nothing(profile: bytes) -> None:
    shown = first_picture(plain("RGB", (120, 160, 130), icc_profile=profile), "image", "png")

    assert (shown == (120, 160, 130)).all()


def test_a_profile_of_another_colour_model_changes_nothing() -> None:
    profile = rgb_profile("Adobe RGB (1998)", 2.19921875, ADOBE_TO_XYZ)

    assert (first_picture(plain("L", 120, icc_profile=profile), "image", "png") == 120).all()


def coded(primaries: int, curve: int) -> bytes:
    """An AVIF that states these codes of ITU-T H.273."""
    data = plain("RGB", (200, 100, 50), "AVIF", quality=100)
    at = data.index(b"colrnclx")
    return data[: at + 8] + struct.pack(">HH", primaries, curve) + data[at + 12 :]


def test_wide_gamut_and_hdr_are_shown_on_the_screen() -> None:
    plain_png = png(8, 2, bytes([148] * 24), png_chunk(b"cICP", bytes([1, 13, 0, 1])))
    hdr_png = png(8, 2, bytes([148] * 24), png_chunk(b"cICP", bytes([9, 16, 0, 1])))

    assert (first_picture(plain_png, "image", "png") == 148).all()
    assert (first_picture(hdr_png, "image", "png") > 230).all(), "58% of PQ is diffuse white"
    assert abs(first_picture(coded(1, 13), "image", "avif")[4, 4].astype(int) - (200, 100, 50)).max() <= 3
    assert first_picture(coded(12, 13), "image", "avif")[4, 4, 0] > 205, "red of Display P3 is redder"


REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "float TIFF": (
        "tiff",
        lambda: tiff(32, 1, struct.pack("<f", 0.5) * 64, sample_format=3),
        "32-bit samples",
    ),
    "float PFM": ("pfm", lambda: b"Pf\n8 8\n-1.0\n" + struct.pack("<f", 0.5) * 64, "32-bit samples"),
    "32-bit TIFF": ("tiff", lambda: tiff(32, 1, struct.pack("<I", 1 << 31) * 64), "32-bit samples"),
    "signed 16-bit TIFF": ("tiff", lambda: tiff(16, 1, b"\0\x40" * 64, sample_format=2), "sign"),
    "signed 8-bit TIFF": ("tiff", lambda: tiff(8, 1, b"\xf0" * 64, sample_format=2), "sign"),
    "16-bit RGB PNG with a transparent colour": (
        "png",
        lambda: png(16, 2, big(1, 2, 3) * 8, trns(1, 2, 3)),
        "16 bits",
    ),
    "AVIF of logarithmic values": ("avif", lambda: coded(1, 9), "colour curve 9"),
    "EPS, which would start a program": (
        "eps",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "decode",
    ),
    "FITS": ("fits", lambda: b"SIMPLE  =                    T".ljust(80) * 36, "decode"),
    "SVG": ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>", "decode"),
    "HTML": ("jpg", lambda: b"<html>404</html>", "decode"),
    "empty": ("png", bytes, "decode"),
    "200 megapixels": (
        "png",
        lambda: png(1, 0, b"", width=20000, height=10000),
        "decompression bomb",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_shows_is_refused_with_the_reason(name: str) -> None:
    file_format, build, reason = REFUSED[name]

    with pytest.raises(DataError, match=reason):
        probe_media(build(), "image", file_format)


def test_an_animation_used_as_an_image_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 10, 10), (10, 200, 10))]
    for image_format in ("GIF", "WEBP", "PNG", "AVIF"):
        data = image_bytes(frames[0], image_format, save_all=True, append_images=frames[1:], duration=100)
        assert probe_media(data, "image", image_format.lower()).num_frames == 1
        shown = first_picture(data, "image", image_format.lower())
        assert abs(shown.astype(int) - (200, 10, 10)).max() < 20, image_format


@pytest.mark.parametrize("depth", [2, 4])
def test_frames_keep_the_transparency_of_their_depth(depth: int) -> None:
    row = {2: b"\xaa\xaa", 4: b"\x55" * 4}[depth]
    still = png(depth, 0, row, trns({2: 2, 4: 5}[depth]))

    assert (first_picture(still, "video", "png") == 255).all()
