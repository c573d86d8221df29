"""Videos are sampled by their own time stamps: on screen is the last frame that has appeared."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from k25_train.data.decode.clock import Clock, Shown, frame_times
from k25_train.data.decode.frames import probe_media
from k25_train.data.decode.items import MediaItem, plan_items, plan_media
from k25_train.data.decode.patches import load_patches
from k25_train.data.formats.frame_times import FrameTimes
from k25_train.errors import DataError
from tests.helpers.media_files import Clip, image_bytes, segment_of
from tests.helpers.tiny_shards import tiny_vision_config

VISION = replace(tiny_vision_config(), image_patch_limit=16384, frame_patch_limit=4096, side_patch_limit=512)
PICTURE = Image.new("RGB", (32, 32), "red")
BURST = [*range(30), *range(60, 331, 30)]
"""A second at 30 frames per second, then one frame per second, in units of 1/30 s."""


def items_of(data: bytes, file_format: str) -> tuple[MediaItem, ...]:
    return plan_items(segment_of(data, "video", file_format), VISION)


def seen(items: Sequence[MediaItem]) -> list[int]:
    return [frame for item in items for frame in item.frames]


def on_screen(stamps: Sequence[float], time: float) -> int:
    return max(number for number, stamp in enumerate(stamps) if stamp <= time)


def animation(delays_ms: Sequence[int], file_format: str, **options: object) -> bytes:
    frames = [
        Image.new("RGB", (28, 28), (number * 8 % 256, number // 32, 0)) for number in range(len(delays_ms))
    ]
    return image_bytes(
        frames[0], file_format, save_all=True, append_images=frames[1:], duration=list(delays_ms), **options
    )


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "nut"])
def test_a_variable_rate_is_sampled_by_time(container: str) -> None:
    data = Clip(container=container, stamps=BURST).encode([PICTURE])
    stamps_s = [stamp / 30 for stamp in BURST]

    info = probe_media(data, "video", container)
    items = items_of(data, container)

    assert info.num_frames == len(BURST)
    assert info.duration_s == pytest.approx(11, abs=1)
    looks = round(info.duration_s * 2)
    assert seen(items) == [
        on_screen(stamps_s, number * info.duration_s / looks + 1e-3) for number in range(looks)
    ]
    for item in items:
        assert item.timestamp_s is not None
        assert on_screen(stamps_s, item.timestamp_s + 1e-3) == item.frames[0]
    patches = load_patches(data, plan_media(segment_of(data, "video", container), VISION), VISION)
    assert patches.shape[0] == sum(item.num_patches for item in items)


CONSTANT = {
    "mp4": Clip(stamps=range(60), tick_s=Fraction(1001, 30000)),
    "B-frames": Clip(stamps=range(60), codec="libx264", options={"bf": "3"}),
    "starts at 5 s": Clip(stamps=range(150, 210)),
    "starts at 5 s, mkv": Clip(container="matroska", stamps=range(150, 210)),
    "milliseconds": Clip(container="matroska", stamps=range(60)),
    "milliseconds, B-frames": Clip(container="flv", codec="libx264", stamps=range(60), options={"bf": "3"}),
    "transport stream": Clip(container="mpegts", codec="libx264", stamps=range(60)),
    "AVI with B-frames": Clip(container="avi", stamps=range(60), options={"bf": "2"}),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_rate_is_recognised_in_every_container(name: str) -> None:
    clip = CONSTANT[name]
    data = clip.encode([PICTURE])

    info = probe_media(data, "video", clip.container)
    items = items_of(data, clip.container)

    times = FrameTimes.parse(info.frame_times)
    assert times.runs == ((1, 60),)
    assert float(times.unit_s) == pytest.approx(clip.tick_s, rel=1e-4)
    assert seen(items) == [0, 15, 30, 45]
    assert items[0].timestamp_s == 0


def test_frames_before_the_edit_list_begins_are_not_shown() -> None:
    data = Clip(stamps=range(-6, 6), codec="libx264").encode([PICTURE])

    info = probe_media(data, "video", "mp4")

    assert info.num_frames < 12
    assert info.duration_s == pytest.approx(info.num_frames / 30)


def test_frames_without_stamps_follow_at_the_stated_rate() -> None:
    data = Clip(container="h264", codec="libx264", stamps=range(12)).encode([PICTURE])

    assert probe_media(data, "video", "h264").frame_times == "1/25 1x12"


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize(
    ("delays_ms", "shown_ms"),
    [
        ([0] * 30, [100] * 30),
        ([10, 10, 10, 10], [100, 100, 100, 100]),
        ([20, 20, 20, 20], [20, 20, 20, 20]),
        ([1000, 40, 0, 3000], [1000, 40, 100, 3000]),
    ],
)
def test_delays_are_those_of_browsers(file_format: str, delays_ms: list[int], shown_ms: list[int]) -> None:
    data = animation(delays_ms, file_format)

    times = FrameTimes.parse(probe_media(data, "video", file_format.lower()).frame_times)

    shown = [units * times.unit_s * 1000 for units, count in times.runs for _ in range(count)]
    assert shown == shown_ms
    assert times.duration_s == sum(shown_ms) / 1000


def test_an_animation_without_delays_is_seen_at_the_sampling_rate() -> None:
    items = items_of(animation([0] * 30, "GIF"), "gif")

    assert seen(items) == [0, 5, 10, 15, 20, 25]
    assert [item.timestamp_s for item in items] == [0, 2]


def test_the_stand_in_picture_of_an_animated_png_is_not_shown() -> None:
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "green", "blue")]
    data = image_bytes(
        frames[0], "PNG", save_all=True, append_images=frames[1:], duration=500, default_image=True
    )

    assert probe_media(data, "video", "png").num_frames == 2


def test_a_frame_that_stays_is_seen_again_with_the_time_of_the_look() -> None:
    data = animation([500] * 8 + [8000], "GIF")

    items = items_of(data, "gif")

    # Nine frames in 12 s: nine looks, every 4/3 s.
    assert seen(items) == [0, 2, 5, 8, 8, 8, 8, 8, 8]
    assert [item.timestamp_s for item in items] == pytest.approx([0, 16 / 3, 32 / 3])
    patches = load_patches(data, plan_media(segment_of(data, "video", "gif"), VISION), VISION)
    assert patches.shape[0] == 9 * 4
    assert (patches[4 * 3 : 4 * 4] == patches[4 * 8 :]).all()


def test_a_late_last_frame_counts_to_the_duration() -> None:
    assert probe_media(animation([100, 100, 2800], "GIF"), "video", "gif").duration_s == 3.0


def shown_at(starts_s: Sequence[Fraction], last_s: Fraction, clock: Clock) -> list[Shown]:
    return [Shown(start, last_s, clock) for start in starts_s]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 5000))
def test_times_of_any_stamps_are_read_back(steps_ms: list[int], last_ms: int) -> None:
    starts_s = [Fraction(sum(steps_ms[:number]), 1000) for number in range(len(steps_ms))]
    times = frame_times(shown_at(starts_s, Fraction(last_ms, 1000), Clock(Fraction(1, 30), Fraction(0))))

    assert FrameTimes.parse(str(times)) == times
    assert times.num_frames == len(steps_ms)
    assert times.num_units * times.unit_s == starts_s[-1] + Fraction(last_ms, 1000)
    for number, sample in enumerate(times.sampled(7)):
        time_s = number * times.num_units * times.unit_s / 7
        assert sample.frame == max(index for index, start in enumerate(starts_s) if start <= time_s)
        assert sample.frame_start * times.unit_s == starts_s[sample.frame]


def test_stamps_that_go_back_are_refused() -> None:
    starts_s = [Fraction(0), Fraction(2), Fraction(1)]

    with pytest.raises(DataError, match=r"go back, from 2.000 to 1.000 s"):
        frame_times(shown_at(starts_s, Fraction(1), Clock(Fraction(1), Fraction(0))))


def test_dropped_frames_of_a_coarse_clock_are_no_rounding() -> None:
    starts_s = [Fraction(number, 10) for number in (0, 1, 3, 4)]

    times = frame_times(shown_at(starts_s, Fraction(1, 10), Clock(Fraction(1, 10), Fraction(1, 10))))

    assert str(times) == "1/10 1 2 1x2"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/30",
        "1/0 1x2",
        "0/1 1",
        "1/30 0x5",
        "1/30 1x0",
        "1/30 -1",
        "1e9 1",
        "1/30  1",
        "1/30 1x" + "9" * 50,
    ],
)
def test_text_that_is_no_frame_times_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"frame"):
        FrameTimes.parse(text)


def test_another_timing_than_the_index_has_is_refused() -> None:
    data = animation([200, 200, 1000], "GIF")
    segment = replace(segment_of(data, "video", "gif"), frame_times="7/15 1x3")

    with pytest.raises(DataError, match="at other times than the index says"):
        load_patches(data, plan_media(segment, VISION), VISION)
    with pytest.raises(ValueError, match="needs frame_times"):
        replace(segment, frame_times="")
    with pytest.raises(ValueError, match="other frames"):
        replace(segment, frame_times="7/15 1x4")
