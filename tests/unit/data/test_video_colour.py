"""Video frames look as their tags say: matrix, range, depth, transparency, HDR."""

import io
from dataclasses import dataclass

import av
import numpy as np
import pytest
from PIL import Image

from k25_train.data.decode.video_colour import to_rgb
from tests.helpers.media_files import Clip, first_picture

BT709, UNSPECIFIED, BT470BG, BT2020 = 1, 2, 5, 9
LIMITED, FULL = 1, 2
PQ, HLG = 16, 18
LUMA = {BT709: (0.2126, 0.0722), BT470BG: (0.299, 0.114), BT2020: (0.2627, 0.0593)}
"""Kr and Kb of each matrix (ITU-R BT.709, BT.601, BT.2020)."""


def expected_rgb(yuv: tuple[int, int, int], matrix: int, full: bool, bits: int) -> np.ndarray:
    """By the definition in the recommendations; values clipped as a screen does."""
    scale = 2 ** (bits - 8)
    luma, blue, red = yuv
    if full:
        y, u, v = luma / (256 * scale - 1), blue / (256 * scale - 1) - 0.5, red / (256 * scale - 1) - 0.5
    else:
        y = (luma / scale - 16) / 219
        u, v = ((value / scale - 128) / 224 for value in (blue, red))
    kr, kb = LUMA[matrix]
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return 255 * np.array([r, g, b]).clip(0, 1)


def uniform(pixel_format: str, values: tuple[int, ...], width: int = 16, height: int = 16) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, pixel_format)
    is_deep = any(component.bits > 8 for component in frame.format.components)
    for plane, value in zip(frame.planes, values, strict=True):
        dtype = np.uint16 if is_deep else np.uint8
        plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype).tobytes())
    return frame


@dataclass(frozen=True, slots=True)
class Tags:
    stated: int
    range: int
    meant: int
    """Matrix that a viewer uses."""
    size: tuple[int, int] = (16, 16)


TAGS = {
    "601": Tags(BT470BG, LIMITED, BT470BG),
    "601, full range": Tags(BT470BG, FULL, BT470BG),
    "709": Tags(BT709, LIMITED, BT709),
    "709, full range": Tags(BT709, FULL, BT709),
    "2020": Tags(BT2020, LIMITED, BT2020),
    "untagged, small": Tags(UNSPECIFIED, 0, BT470BG),
    "untagged, HD": Tags(UNSPECIFIED, 0, BT709, (1280, 720)),
    "untagged, HD on its side": Tags(UNSPECIFIED, 0, BT709, (720, 1280)),
    "601, HD": Tags(BT470BG, LIMITED, BT470BG, (1280, 720)),
    "untagged matrix, full range": Tags(UNSPECIFIED, FULL, BT470BG),
}


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("name", TAGS)
def test_matrix_and_range_are_the_tagged_ones(name: str, bits: int) -> None:
    tags = TAGS[name]
    yuv = tuple(value * 2 ** (bits - 8) for value in (126, 100, 180))
    frame = uniform("yuv444p" if bits == 8 else f"yuv444p{bits}le", yuv, *tags.size)
    frame.colorspace, frame.color_range = tags.stated, tags.range

    shown = np.asarray(to_rgb(frame, legacy=False))[8, 8]

    np.testing.assert_allclose(shown, expected_rgb(yuv, tags.meant, tags.range == FULL, bits), atol=3)


FORMATS: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {
    "gray": ((200,), (200, 200, 200)),
    "gray10le": ((800,), (200, 200, 200)),
    "gray16le": ((200 << 8,), (200, 200, 200)),
    "gbrp": ((100, 50, 200), (200, 100, 50)),
    "gbrp10le": ((400, 200, 800), (200, 100, 50)),
    "gbrap": ((100, 50, 200, 0), (255, 255, 255)),
    "yuva444p": ((126, 128, 128, 0), (255, 255, 255)),
    "yuva444p10le": ((504, 512, 512, 0), (255, 255, 255)),
    "yuvj444p": ((200, 128, 128), (200, 200, 200)),
}


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_other_pixel_formats(pixel_format: str) -> None:
    values, expected = FORMATS[pixel_format]

    shown = np.asarray(to_rgb(uniform(pixel_format, values), legacy=False))[8, 8]

    np.testing.assert_allclose(shown, expected, atol=3)


@pytest.mark.parametrize("curve", [PQ, HLG])
def test_hdr_white_is_white_and_its_grey_is_not_washed_out(curve: int) -> None:
    """Diffuse white of BT.2408 is 58% of PQ's range (203 cd/m²) and 75% of HLG's."""
    signal = {PQ: 0.58, HLG: 0.75}[curve]
    shown = []
    for share in (signal, signal / 2):
        frame = uniform("yuv444p10le", (round(64 + 876 * share), 512, 512))
        frame.colorspace, frame.color_range = BT2020, LIMITED
        frame.color_primaries, frame.color_trc = BT2020, curve
        shown.append(np.asarray(to_rgb(frame, legacy=False))[8, 8])

    assert (shown[0] >= 235).all()
    assert (shown[1] < 140).all()


def test_wide_primaries_become_those_of_the_screen() -> None:
    frame = uniform("yuv444p", (126, 90, 160))
    frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = BT709, LIMITED, 12, BT709
    plain = np.asarray(to_rgb(frame, legacy=True))[8, 8].astype(int)

    shown = np.asarray(to_rgb(frame, legacy=False))[8, 8].astype(int)

    assert shown[0] > plain[0] + 5, "red of Display P3 is redder"


TRANSPARENT = {
    "webm": Clip(container="webm", codec="libvpx-vp9", pixel_format="yuva420p"),
    "qtrle": Clip(container="mov", codec="qtrle", pixel_format="argb"),
    "prores": Clip(container="mov", codec="prores_ks", pixel_format="yuva444p10le"),
    "png": Clip(container="mov", codec="png", pixel_format="rgba"),
    "ffv1": Clip(container="matroska", codec="ffv1", pixel_format="bgra"),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_video_is_on_white(name: str) -> None:
    clip = TRANSPARENT[name]
    pixels = np.zeros((32, 64, 4), np.uint8)
    pixels[:, :32] = (200, 0, 0, 255)
    data = clip.encode([Image.fromarray(pixels)])

    shown = first_picture(data, "video", clip.container)

    assert (shown[4:-4, 36:-4] > 250).all()
    assert abs(shown[4:-4, 4:28].astype(int) - (200, 0, 0)).max() < 12


@pytest.mark.parametrize("matrix", [BT709, BT470BG])
def test_tags_of_a_file_reach_the_picture(matrix: int) -> None:
    tags = {"colorspace": matrix, "color_range": FULL}
    clip = Clip(codec="libx264", pixel_format="yuv444p", tags=tags, options={"qp": "0"})
    frame = uniform("yuv444p", (126, 100, 180), 32, 32)
    frame.colorspace, frame.color_range = matrix, FULL
    data = encode_frame(clip, frame)

    shown = first_picture(data, "video", "mp4")[8, 8]

    np.testing.assert_allclose(shown, expected_rgb((126, 100, 180), matrix, True, 8), atol=4)


def encode_frame(clip: Clip, frame: av.VideoFrame) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=clip.container) as container:
        stream = container.add_stream(clip.codec, rate=clip.rate, options=dict(clip.options))
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, clip.pixel_format
        for name, value in clip.tags.items():
            setattr(stream.codec_context, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
