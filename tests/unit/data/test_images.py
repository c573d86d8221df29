"""Preprocessing: sizes and patch layout of the released preprocessor, and decoding by file format."""

import io
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor, navit_resize

from k25_train.config.vision import VisionConfig
from k25_train.data.decode import patches
from k25_train.data.decode.frames import MediaInfo, probe_media
from k25_train.data.decode.items import (
    fits_aspect,
    format_timestamp,
    grid_of,
    plan_items,
    plan_media,
    resized_size,
)
from k25_train.data.decode.patches import load_patches, patchify
from k25_train.data.formats.frame_times import FrameTimes
from k25_train.data.formats.records import MediaSegment
from k25_train.errors import DataError
from k25_train.model.moonvit_positions import normalised
from tests.helpers.tiny_shards import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    Media,
    make_image,
    make_picture,
    make_video,
    tiny_vision_config,
)

CHECKPOINT = replace(
    tiny_vision_config(), image_patch_limit=16384, frame_patch_limit=4096, side_patch_limit=512
)
sides = st.one_of(st.integers(1, 300), st.integers(1, 40_000))


def segment_of(media: Media, info: MediaInfo | None = None) -> MediaSegment:
    info = info or probe_media(media.data, media.type, media.format)
    return MediaSegment(
        type=media.type,
        shard="x.tar",
        offset=0,
        num_bytes=len(media.data),
        format=media.format,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        duration_s=info.duration_s,
        frame_times=info.frame_times,
    )


def patches_of(media: Media, vision: VisionConfig = CHECKPOINT) -> torch.Tensor:
    return load_patches(media.data, plan_media(segment_of(media), vision), vision)


def unpatchify(patches: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """[h*w, 588] -> [H, W, 3] uint8, the inverse of the loader's layout."""
    pixels = patches.view(rows, columns, 3, 14, 14).permute(0, 3, 1, 4, 2)
    return pixels.reshape(rows * 14, columns * 14, 3).numpy()


@given(sides, sides, st.sampled_from([(16384, 512), (4096, 512), (64, 32)]))
def test_sizes_equal_the_independent_implementation(width: int, height: int, limits: tuple[int, int]) -> None:
    patch_limit, side_limit = limits
    vision = replace(CHECKPOINT, side_patch_limit=side_limit)

    (new_height, new_width), (padded_height, padded_width) = navit_resize(
        height, width, 14, 2, patch_limit, side_limit
    )

    assert resized_size(width, height, patch_limit, vision) == (new_width, new_height)
    assert grid_of(width, height, patch_limit, vision) == (padded_height // 14, padded_width // 14)


@given(sides, sides)
def test_images_are_never_scaled_up_and_grids_are_whole_tokens(width: int, height: int) -> None:
    new_width, new_height = resized_size(width, height, 16384, CHECKPOINT)
    rows, columns = grid_of(width, height, 16384, CHECKPOINT)

    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert rows % 2 == 0 and columns % 2 == 0 and rows >= 2 and columns >= 2
    assert max(rows, columns) <= 512


@pytest.mark.parametrize(("width", "height"), [(28, 28), (56, 84), (100, 37), (13, 7)])
def test_patches_of_an_unresized_image_equal_the_independent_processor(width: int, height: int) -> None:
    picture = make_picture(width, height, seed=1)
    media = make_image(width, height, "png", seed=1)

    expected = Kimi_K25ImageProcessor()(picture, return_tensors="pt")

    assert [[1, *grid_of(width, height, 16384, CHECKPOINT)]] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(
        normalised(patches_of(media)), expected["pixel_values"].reshape(-1, 588), rtol=0, atol=1e-6
    )


def test_resized_image_is_close_to_the_independent_processor() -> None:
    media = make_image(300, 200, "png", seed=2)
    vision = replace(CHECKPOINT, image_patch_limit=64)

    expected = Kimi_K25ImageProcessor(max_patches=64)(make_picture(300, 200, seed=2), return_tensors="pt")
    difference = (normalised(patches_of(media, vision)) - expected["pixel_values"].reshape(-1, 588)).abs()

    # Two bicubic filters in eight bits: a few levels apart at edges of the mosaic, equal elsewhere.
    assert difference.mean() < 1 / 127.5
    assert difference.max() < 8 / 127.5


def test_padding_is_black_and_only_right_and_bottom() -> None:
    image = unpatchify(patches_of(make_image(30, 20, "png", seed=3)), 2, 4)

    np.testing.assert_array_equal(image[:20, :30], np.asarray(make_picture(30, 20, seed=3)))
    assert not image[20:].any()
    assert not image[:, 30:].any()


@pytest.mark.parametrize("file_format", IMAGE_FORMATS)
def test_image_formats_decode_to_the_picture(file_format: str) -> None:
    media = make_image(56, 56, file_format, seed=4)

    difference = unpatchify(patches_of(media), 4, 4).astype(int) - np.asarray(make_picture(56, 56, seed=4))

    assert abs(difference).mean() < (1 if file_format == "png" else 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_eight_bit_rgb(mode: str) -> None:
    grey = np.full((28, 28), 128, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray((grey.astype(np.uint16) << 8) + 99)
    elif mode == "1":
        image = Image.fromarray(grey).point(lambda value: 255).convert("1")
    else:
        colour = Image.fromarray(grey).convert("RGB")
        image = colour.quantize(4) if mode == "P" else colour.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    media = Media("image", "png", buffer.getvalue())

    decoded = unpatchify(patches_of(media), 2, 2)

    assert (decoded == (255 if mode == "1" else 128)).all()


@pytest.mark.parametrize("palette", [False, True])
def test_transparent_areas_become_white(palette: bool) -> None:
    pixels = np.zeros((28, 28, 4), dtype=np.uint8)
    pixels[:, :14] = (200, 0, 0, 255)
    pixels[:, 14:] = (0, 0, 0, 0)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.quantize(4) if palette else image).save(buffer, "PNG")

    decoded = unpatchify(patches_of(Media("image", "png", buffer.getvalue())), 2, 2)

    assert (decoded[:, :14] == (200, 0, 0)).all()
    assert (decoded[:, 14:] == 255).all()


def test_orientation_tag_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    buffer = io.BytesIO()
    make_picture(56, 28, seed=5).save(buffer, "PNG", exif=exif)

    info = probe_media(buffer.getvalue(), "image", "png")

    assert (info.width, info.height) == (28, 56)


@pytest.mark.parametrize("file_format", VIDEO_FORMATS)
def test_videos_become_chunks_of_at_most_four_frames(file_format: str) -> None:
    media = make_video(64, 48, file_format, num_frames=12, fps=4, seed=6)
    segment = segment_of(media)
    vision = replace(CHECKPOINT, video_fps=2.0)

    items = plan_items(segment, vision)
    patches = load_patches(media.data, plan_media(segment, vision), vision)

    assert (segment.num_frames, segment.duration_s) == (12, 3.0)
    assert [item.grid_thw for item in items] == [(4, 4, 6), (2, 4, 6)]
    assert [item.frames for item in items] == [(0, 2, 4, 6), (8, 10)]
    assert [item.timestamp_s for item in items] == [0.0, 2.0]
    assert [item.num_tokens for item in items] == [6, 6]
    assert patches.shape == (sum(item.num_patches for item in items), 588)
    for position, frame in enumerate(frame for item in items for frame in item.frames):
        shown = unpatchify(patches[24 * position : 24 * (position + 1)], 4, 6)[:48, :64]
        difference = abs(shown.astype(int) - np.asarray(make_picture(64, 48, seed=6 + frame)))
        assert difference.mean() < (1 if file_format == "png" else 30), f"frame {frame}"


def test_frames_have_their_own_patch_limit() -> None:
    media = make_video(112, 112, "png", num_frames=2, fps=2, seed=7)

    items = plan_items(segment_of(media), replace(CHECKPOINT, frame_patch_limit=16))

    assert items[0].grid_thw == (2, 4, 4)


@given(st.integers(1, 5000), st.fractions(Fraction(1, 1000), 2), st.floats(0.1, 30))
def test_samples_of_a_constant_rate_are_distinct_in_order_and_follow_the_rate(
    num_frames: int, interval_s: Fraction, fps: float
) -> None:
    times = FrameTimes.even(num_frames, interval_s)
    info = MediaInfo(
        width=28, height=28, num_frames=num_frames, duration_s=times.duration_s, frame_times=str(times)
    )
    segment = segment_of(Media("video", "mp4", b""), info)

    items = plan_items(segment, replace(CHECKPOINT, video_fps=fps))
    frames = [frame for item in items for frame in item.frames]

    num_samples = min(num_frames, max(1, round(times.duration_s * fps)))
    assert frames == [number * num_frames // num_samples for number in range(num_samples)]
    assert [item.timestamp_s for item in items] == [
        item.frames[0] * times.duration_s / num_frames for item in items
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00.000"), (1.5, "00:00:01.500"), (59.9996, "00:01:00.000"), (7384.25, "02:03:04.250")],
)
def test_timestamps(seconds: float, text: str) -> None:
    assert format_timestamp(seconds) == text


def corrupted(media: Media, what: str) -> bytes:
    damaged = {
        "empty": b"",
        "garbage": b"no media file " * 20,
        "truncated": media.data[: len(media.data) // 2],
        "head only": media.data[:40],
    }
    return damaged[what]


@pytest.mark.parametrize("what", ["empty", "garbage", "truncated", "head only"])
@pytest.mark.parametrize("file_format", IMAGE_FORMATS)
def test_broken_image_raises_and_the_next_one_decodes(file_format: str, what: str) -> None:
    media = make_image(120, 90, file_format, seed=8)
    before = patches_of(media)

    with pytest.raises(DataError, match="does not decode"):
        load_patches(corrupted(media, what), plan_media(segment_of(media), CHECKPOINT), CHECKPOINT)

    assert torch.equal(before, patches_of(media))


@pytest.mark.parametrize("what", ["empty", "garbage", "truncated", "head only"])
@pytest.mark.parametrize("file_format", VIDEO_FORMATS)
def test_broken_video_raises(file_format: str, what: str) -> None:
    media = make_video(64, 48, file_format, num_frames=12, fps=4, seed=9)

    with pytest.raises(DataError, match=r"does not decode|decodes to \d+ frame"):
        load_patches(corrupted(media, what), plan_media(segment_of(media), CHECKPOINT), CHECKPOINT)


@pytest.mark.parametrize("file_format", VIDEO_FORMATS)
def test_some_items_of_a_video_are_those_of_all(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    media = make_video(64, 48, file_format, num_frames=24, fps=4, seed=9)
    segment = segment_of(media)
    sizes = [item.num_patches for item in plan_items(segment, CHECKPOINT)]
    whole = load_patches(media.data, plan_media(segment, CHECKPOINT), CHECKPOINT).split(sizes)
    assert len(whole) == 3

    built: list[tuple[int, ...]] = []

    def patchify_and_note(frame: np.ndarray, *rest: Any) -> torch.Tensor:
        built.append(frame.shape)
        return patchify(frame, *rest)

    monkeypatch.setattr(patches, "patchify", patchify_and_note)
    for positions in ([0], [1], [2], [0, 2]):
        built.clear()
        found = load_patches(media.data, plan_media(segment, CHECKPOINT), CHECKPOINT, positions)
        assert torch.equal(found, torch.cat([whole[position] for position in positions]))
        assert len(built) == sum(
            item.grid_thw[0]
            for position, item in enumerate(plan_items(segment, CHECKPOINT))
            if position in positions
        )


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("file_format", ["gif", "png"])
def test_a_video_that_breaks_late_breaks_for_every_item(file_format: str, position: int) -> None:
    media = make_video(64, 48, file_format, num_frames=24, fps=4, seed=9)
    segment, cut = segment_of(media), media.data[: len(media.data) * 2 // 3]
    messages = set()
    for positions in (None, [position]):
        with pytest.raises(DataError, match=r"does not decode|decodes to \d+ frame") as caught:
            load_patches(cut, plan_media(segment, CHECKPOINT), CHECKPOINT, positions)
        messages.add(str(caught.value).split(" at 0x")[0])
    assert len(messages) == 1
    planned = plan_media(replace(segment, num_frames=23, duration_s=5.75, frame_times="1/4 1x23"), CHECKPOINT)
    with pytest.raises(DataError, match=r"decodes to 24 frame\(s\), the index says 23"):
        load_patches(media.data, planned, CHECKPOINT, [position])


def test_sizes_other_than_the_index_says_are_refused() -> None:
    image, video = make_image(40, 30, "png", seed=1), make_video(64, 48, "gif", 8, 4, seed=1)

    with pytest.raises(DataError, match="decodes to 40x30 pixels, the index says 41x30"):
        load_patches(image.data, plan_media(replace(segment_of(image), width=41), CHECKPOINT), CHECKPOINT)
    with pytest.raises(DataError, match=r"decodes to 8 frame\(s\), the index says 9"):
        longer = replace(segment_of(video), num_frames=9, duration_s=2.25, frame_times="1/4 1x9")
        load_patches(video.data, plan_media(longer, CHECKPOINT), CHECKPOINT)


def test_extreme_aspect_is_noticed_from_sizes_alone() -> None:
    segment = segment_of(make_image(28, 28, "png", seed=1))

    assert fits_aspect(replace(segment, width=7168, height=1), CHECKPOINT)
    assert not fits_aspect(replace(segment, width=7169, height=1), CHECKPOINT)
    assert fits_aspect(replace(segment, width=71680, height=10), CHECKPOINT)
