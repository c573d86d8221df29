"""Pictures are turned, mirrored and stretched as a viewer does, and the index has the size that is shown."""

import io
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import av.filter
import numpy as np
import pytest
from PIL import Image

from k25_train.data.decode.frames import decode_frames, probe_media
from k25_train.data.decode.items import plan_media
from k25_train.data.decode.patches import load_patches
from k25_train.data.formats.records import MediaSegment
from k25_train.errors import DataError
from k25_train.model.moonvit_positions import normalised
from tests.helpers.media_files import Clip, corners, first_picture, image_bytes, segment_of
from tests.helpers.tiny_shards import tiny_vision_config

CHECKPOINT = replace(
    tiny_vision_config(), image_patch_limit=16384, frame_patch_limit=4096, side_patch_limit=512
)
TURNS = {
    "as it is": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transversed": (0, -1, -1, 0),
}


def autorotated(data: bytes, turn: tuple[int, int, int, int]) -> np.ndarray:
    """The first frame as the `ffmpeg` program turns it (fftools/ffmpeg_filter.c), by libavfilter."""
    a, b, c, d = turn
    angle = round(math.degrees(math.atan2(b, a))) % 360
    if angle == 90:
        filters = [("transpose", "cclock_flip" if c > 0 else "clock")]
    elif angle == 270:
        filters = [("transpose", "clock_flip" if c < 0 else "cclock")]
    else:
        filters = [("hflip", "")] * (angle == 180 and a < 0) + [("vflip", "")] * (d < 0)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=stream)]
        nodes += [graph.add(name, value) for name, value in filters]
        nodes.append(graph.add("buffersink"))
        for one, following in pairwise(nodes):
            one.link_to(following)
        graph.configure()
        graph.push(frame)
        return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("name", TURNS)
def test_videos_are_turned_as_ffmpeg_turns_them(container: str, name: str) -> None:
    data = Clip(container=container, turn=TURNS[name]).encode([corners(96, 64)])

    info = probe_media(data, "video", container)
    shown = first_picture(data, "video", container)
    expected = autorotated(data, TURNS[name])

    assert (info.width, info.height) == ((64, 96) if TURNS[name][0] == 0 else (96, 64))
    assert shown.shape == expected.shape == (info.height, info.width, 3)
    assert abs(shown.astype(int) - expected).mean() < 2


def test_a_turned_video_fills_the_patches_that_the_index_plans() -> None:
    data = Clip(turn=TURNS["90"]).encode([corners(112, 56)])
    segment = segment_of(data, "video", "mp4")
    media = plan_media(segment, CHECKPOINT)

    patches = normalised(load_patches(data, media, CHECKPOINT))

    assert media.items[0].grid_thw == (1, 8, 4)
    top_left = patches[0].view(3, -1).mean(1)
    assert top_left[2] > 0.5 > top_left[0], "blue, which is at the bottom left of the coded picture"


@pytest.mark.parametrize("turn", [(1, 1, -1, 1), (1, 2, -2, 1)])
def test_other_display_matrices_are_refused(turn: tuple[int, int, int, int]) -> None:
    data = Clip(turn=turn).encode([corners(96, 64)])

    with pytest.raises(DataError, match="no quarter turn"):
        probe_media(data, "video", "mp4")


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize(
    ("aspect", "size"),
    [(Fraction(16, 11), (140, 64)), (Fraction(1, 2), (96, 128)), (Fraction(1), (96, 64))],
)
def test_pixels_that_are_not_square_are_stretched(
    container: str, aspect: Fraction, size: tuple[int, int]
) -> None:
    data = Clip(container=container, pixel_aspect=aspect).encode([corners(96, 64)])

    info = probe_media(data, "video", container)

    assert (info.width, info.height) == size


def test_a_stretched_and_turned_video_is_whole_in_its_patches() -> None:
    data = Clip(turn=TURNS["90"], pixel_aspect=Fraction(2)).encode([corners(56, 56)])
    segment = segment_of(data, "video", "mp4")

    patches = normalised(load_patches(data, plan_media(segment, CHECKPOINT), CHECKPOINT))

    assert (segment.width, segment.height) == (56, 112)
    picture = patches.view(8, 4, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 112, 56)
    assert picture[2, :50, :20].mean() > 0.5, "blue above"
    assert picture[1, 62:, 36:].mean() > 0.4, "green to the right below"


def test_in_an_index_of_version_1_videos_are_as_they_are_coded() -> None:
    data = Clip(turn=TURNS["90"], pixel_aspect=Fraction(2)).encode([corners(96, 64)])
    info = replace(probe_media(data, "video", "mp4"), width=96, height=64)
    now = segment_of(data, "video", "mp4", info)
    old = replace(now, frame_times="", format_version=1)

    assert load_patches(data, plan_media(old, CHECKPOINT), CHECKPOINT).shape[0] == 6 * 8
    with pytest.raises(DataError, match="decodes to 64x192 pixels, the index says 96x64"):
        load_patches(data, plan_media(now, CHECKPOINT), CHECKPOINT)


EXIF_TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What the tag says: where row 0 and column 0 of the stored picture are (Exif 2.32, 4.6.5.1)."""


@pytest.mark.parametrize("orientation", EXIF_TURNS)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_as_their_tag_says(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = corners(48, 32)
    data = image_bytes(picture, file_format, exif=exif)

    info = probe_media(data, "image", file_format.lower())
    shown = first_picture(data, "image", file_format.lower())
    expected = EXIF_TURNS[orientation](np.asarray(picture))

    assert (info.height, info.width) == shown.shape[:2] == expected.shape[:2]
    assert abs(shown.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("file_format", ["WEBP", "PNG"])
def test_animated_images_are_turned_as_their_tag_says(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    frames = [corners(48, 32), corners(48, 32).transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    data = image_bytes(
        frames[0],
        file_format,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        exif=exif,
        lossless=True,
    )

    decoded = [
        (frame.size, np.asarray(frame.to_rgb()))
        for frame in decode_frames(data, "video", file_format.lower())
    ]

    for (size, shown), frame in zip(decoded, frames, strict=True):
        expected = EXIF_TURNS[orientation](np.asarray(frame))
        assert size == expected.shape[1::-1]
        assert abs(shown.astype(int) - expected).mean() < 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_orientation_is_no_orientation() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    data = image_bytes(corners(48, 32), "JPEG", exif=exif)

    segment: MediaSegment = segment_of(data, "image", "jpg")

    assert (segment.width, segment.height) in ((48, 32), (32, 48))
    assert load_patches(data, plan_media(segment, CHECKPOINT), CHECKPOINT).any()
