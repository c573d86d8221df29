"""Damaged files and files without one plain video are skipped with a reason, never shown wrong."""

import io
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from k25_train.data.decode.frames import probe_media
from k25_train.data.decode.items import plan_media
from k25_train.data.decode.media import MediaReader
from k25_train.data.decode.patches import load_patches
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.formats.sample_json import SampleError
from k25_train.errors import DataError
from tests.helpers.media_files import Clip, corners, segment_of
from tests.helpers.tiny_shards import (
    Sample,
    make_text,
    make_video,
    tiny_vision_config,
    write_shard_set,
)

VISION = tiny_vision_config()
TICK_S = Fraction(1, 30)


def flip(path: Path, first: int, num_bytes: int, seed: int) -> None:
    """Change one bit somewhere in the middle of a stretch of a file."""
    rng = random.Random(seed)
    data = bytearray(path.read_bytes())
    data[first + num_bytes // 4 + rng.randrange(num_bytes // 2)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("file_format", ["mp4", "gif", "webp", "png"])
def test_any_changed_bit_of_a_file_is_noticed(tmp_path: Path, file_format: str) -> None:
    video = make_video(64, 48, file_format, num_frames=12, fps=4, seed=1)
    folder = write_shard_set(tmp_path / "set", {"train": [Sample("v", "video", [video, "words"])]})
    shard = folder / "train-00000.tar"
    intact = shard.read_bytes()
    for seed in range(5):
        dataset = load_dataset(str(folder))
        (segment,) = dataset.splits["train"][0].media
        flip(shard, segment.offset, segment.num_bytes, seed)
        reader = MediaReader(dataset.reader, VISION)
        media = plan_media(segment, VISION)

        failures = {
            reader.load(media, positions).failure for positions in (None, [0], [len(media.items) - 1])
        }

        (failure,) = failures
        assert failure is not None
        assert "changed since it was indexed: its CRC-32 is" in failure
        shard.write_bytes(intact)
    assert MediaReader(dataset.reader, VISION).load(media).failure is None


def test_a_changed_bit_of_a_text_is_noticed(tmp_path: Path) -> None:
    sample = Sample("t", "text", [make_text(40, 1)])
    folder = write_shard_set(tmp_path / "set", {"train": [sample]})
    dataset = load_dataset(str(folder))
    (record,) = dataset.splits["train"]
    flip(folder / record.shard, record.offset, record.num_bytes, 3)

    with pytest.raises(SampleError, match=r"sample t: changed since it was indexed"):
        dataset.reader.read_texts(record)


def noisy(codec: str, container: str, pixel_format: str = "yuv420p") -> bytes:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pictures = [
        Image.fromarray(np.roll(coarse, shift, 1)).resize((64, 48), Image.Resampling.NEAREST)
        for shift in range(12)
    ]
    return Clip(container=container, codec=codec, pixel_format=pixel_format, stamps=range(12)).encode(
        pictures
    )


@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("wmv2", "asf")])
def test_damage_that_the_decoder_sees_is_not_painted_over(codec: str, container: str) -> None:
    """Where no checksum is there, as in an index of version 1 or before a file is indexed.

    Decoders of other codecs see less; that of wmv2 sees nearly all only if it is told to be strict.
    """
    data = noisy(codec, container)
    probe_media(data, "video", container)
    num_refused = 0
    for seed in range(8):
        rng = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(data) // 4, len(data) * 3 // 4)] ^= 1 << rng.randrange(8)
        try:
            probe_media(bytes(damaged), "video", container)
        except DataError:
            num_refused += 1
    assert num_refused >= 6


def streams(*, videos: int = 0, cover: bool = False, audio: bool = False, container: str = "mp4") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        sound = file.add_stream("aac", rate=44100) if audio else None
        pictures = [file.add_stream("mpeg4", rate=30) for _ in range(videos)]
        if cover:
            pictures.append(file.add_stream("mjpeg", rate=30))
            pictures[-1].disposition = Disposition.attached_pic
        for stream in pictures:
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if stream.codec.name == "mjpeg" else "yuv420p"
        for stream in pictures:
            for number in range(1 if stream.codec.name == "mjpeg" else 3):
                frame = av.VideoFrame.from_image(corners(64, 48))
                frame.pts, frame.time_base = number, TICK_S
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        if sound is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 44100, 0
            file.mux(sound.encode(tone))
            file.mux(sound.encode(None))
    return buffer.getvalue()


def two_sizes() -> bytes:
    clip = Clip(container="h264", codec="libx264", stamps=range(6))
    return clip.encode([corners(64, 48)]) + clip.encode([corners(96, 64)])


def no_frames() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.start_encoding()
    return buffer.getvalue()


REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "sound alone": ("mp4", lambda: streams(audio=True), "has no video stream"),
    "sound with a cover": ("mp4", lambda: streams(audio=True, cover=True), "no video, only cover art"),
    "two videos": ("mp4", lambda: streams(videos=2), "has 2 video streams"),
    "two videos, mkv": ("mkv", lambda: streams(videos=2, container="matroska"), "has 2 video streams"),
    "another size on the way": ("h264", two_sizes, "changes its size from 64x48 to 96x64 at frame 6"),
    "no frames": ("mkv", no_frames, "no frames|does not decode"),
    "empty": ("mp4", bytes, "does not decode"),
    "HTML": ("mp4", lambda: b"<html>404</html>", "does not decode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_one_plain_video_are_refused_with_the_reason(name: str) -> None:
    file_format, build, reason = REFUSED[name]

    with pytest.raises(DataError, match=reason):
        probe_media(build(), "video", file_format)


def test_a_video_with_sound_and_a_cover_is_the_video() -> None:
    info = probe_media(streams(videos=1, audio=True, cover=True), "video", "mp4")

    assert (info.width, info.height, info.num_frames) == (64, 48, 3)


@pytest.mark.parametrize("num_frames", [2, 4])
def test_fewer_or_more_frames_than_indexed_are_refused(num_frames: int) -> None:
    data = Clip(stamps=range(3)).encode([corners(64, 48)])
    segment = segment_of(data, "video", "mp4")
    other = replace(
        segment, num_frames=num_frames, duration_s=num_frames / 30, frame_times=f"1/30 1x{num_frames}"
    )

    with pytest.raises(DataError, match=rf"decodes to 3 frame\(s\), the index says {num_frames}"):
        load_patches(data, plan_media(other, VISION), VISION)


CODECS = {
    "h264": ("libx264", "mp4", "yuv420p"),
    "hevc": ("libx265", "mp4", "yuv420p"),
    "vp9": ("libvpx-vp9", "webm", "yuv420p"),
    "av1": ("libsvtav1", "mp4", "yuv420p"),
    "mpeg4": ("mpeg4", "avi", "yuv420p"),
    "mpeg2": ("mpeg2video", "mpegts", "yuv420p"),
    "mjpeg": ("mjpeg", "mov", "yuvj420p"),
    "prores, 10 bit": ("prores_ks", "mov", "yuv422p10le"),
    "ffv1, 16 bit": ("ffv1", "matroska", "gbrp16le"),
    "flv1": ("flv", "flv", "yuv420p"),
    "wmv2": ("wmv2", "asf", "yuv420p"),
    "raw": ("rawvideo", "avi", "bgr24"),
    "GIF by ffmpeg": ("gif", "gif", "rgb8"),
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_has_its_size_its_frames_and_its_duration(name: str) -> None:
    codec, container, pixel_format = CODECS[name]
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    clip = Clip(
        codec=codec,
        container=container,
        pixel_format=pixel_format,
        stamps=range(12),
        tick_s=Fraction(1, 25),
        rate=25,
        options=options,
    )
    data = clip.encode([corners(64, 48)])

    info = probe_media(data, "video", container)

    assert (info.width, info.height, info.num_frames) == (64, 48, 12)
    assert info.duration_s == pytest.approx(0.48, abs=0.002)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("gif", "gif")])
def test_one_frame_is_a_video(container: str, codec: str) -> None:
    clip = Clip(
        container=container, codec=codec, pixel_format="rgb8" if codec == "gif" else "yuv420p", stamps=[0]
    )

    info = probe_media(clip.encode([corners(64, 48)]), "video", container)

    assert info.num_frames == 1
    assert info.duration_s > 0
