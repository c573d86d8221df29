"""A shard set written by the first version of the index still trains, with the meaning it had."""

import hashlib
from dataclasses import replace
from pathlib import Path

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.items import format_timestamp, plan_media
from k25_train.data.decode.patches import load_patches
from k25_train.data.formats.dataset import Dataset, load_dataset
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.model.moonvit_positions import normalised
from tests.helpers.tiny_shards import tiny_vision_config

OLD_SET = Path(__file__).parents[2] / "golden" / "shard_set_v1"
"""Written by the code before version 2: a text, a captioned image, and a GIF of six frames, the last of them
shown for 2 s, the others for 0.2 s."""
CHECKPOINT = replace(
    tiny_vision_config(), image_patch_limit=16384, frame_patch_limit=4096, side_patch_limit=512
)


def video_of(dataset: Dataset) -> tuple[SampleRecord, MediaSegment]:
    record = next(record for record in dataset.splits["train"] if record.kind == "video")
    return record, record.media[0]


def patches_digest(dataset: Dataset, segment: MediaSegment, vision: VisionConfig) -> str:
    data = dataset.reader.read(segment.shard, segment.offset, segment.num_bytes)
    return hashlib.sha256(
        normalised(load_patches(data, plan_media(segment, vision), vision)).numpy().tobytes()
    ).hexdigest()


def test_its_frames_are_evenly_spread_as_they_were() -> None:
    dataset = load_dataset(str(OLD_SET))
    record, segment = video_of(dataset)

    items = plan_media(segment, CHECKPOINT).items

    assert (segment.format_version, segment.frame_times, segment.crc32, record.crc32) == (1, "", "", "")
    assert dataset.reader.read_texts(record) == ("", "shapes move")
    assert [item.frames for item in items] == [(0, 1, 2, 3), (4, 5)]
    assert [format_timestamp(item.timestamp_s or 0) for item in items] == ["00:00:00.000", "00:00:02.000"]
    assert patches_digest(dataset, segment, CHECKPOINT) == (
        "ce31646e855b53c448d92ffc119363e5d76025a2e4134f370d3792dcc288f457"
    )


def test_its_videos_are_neither_turned_nor_stretched() -> None:
    """Sizes in such an index are those of the coded pixels; see `test_video_display.py` for today's."""
    _, segment = video_of(load_dataset(str(OLD_SET)))

    assert segment.times.num_frames == 6
    assert plan_media(segment, CHECKPOINT).items[0].grid_thw == (4, 2, 2)
