"""Vision items and their sizes, planned from index values alone: no file is opened.

Limits are those of the released checkpoint's preprocessor, from the vision config.
"""

import math
from dataclasses import dataclass

from k25_train.config.vision import VisionConfig
from k25_train.data.formats.records import MediaSegment, SampleRecord
from parallel.dep.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaItem:
    """What the tower sees as one item: an image, or a chunk of at most `pos_emb_time` video frames."""

    grid_thw: Grid
    """Frames, rows and columns of patches, padding included."""
    frames: tuple[int, ...]
    """Positions of its frames in the file, ascending; (0,) for an image. A frame that is on screen for long
    may be seen more than once, in one item or in several."""
    timestamp_s: float | None
    """When the first frame of a video chunk appears or, if the chunk before has seen it already, when it is
    seen again; None for an image."""

    @property
    def num_patches(self) -> int:
        """t x h x w."""
        return self.grid_thw.num_patches

    @property
    def num_tokens(self) -> int:
        """Tokens of the language model: 2x2 patches merged, time pooled, hence independent of t."""
        return self.grid_thw.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What the random changes of an image or video depend on."""

    key: int
    """A hash of seed, source, item and epoch; 0 if nothing is changed."""
    number: int
    """Position among the images and videos of its sample."""
    record: SampleRecord
    """The sample, whose words limit what is changed."""


AS_STORED = Drawn(
    key=0,
    number=0,
    record=SampleRecord(shard="", key="", kind="", source="", offset=0, num_bytes=0, segments=()),
)
"""Changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMedia:
    """An image or video, and what the tower sees of it."""

    segment: MediaSegment
    """Where its file is, and its native size."""
    items: tuple[MediaItem, ...]
    """Its vision items, in the order of their placeholders."""
    drawn: Drawn = AS_STORED
    """How it is changed at random."""


def plan_media(segment: MediaSegment, vision: VisionConfig) -> PlannedMedia:
    """Plan an image or video from index values alone."""
    return PlannedMedia(segment=segment, items=plan_items(segment, vision))


def plan_items(segment: MediaSegment, vision: VisionConfig) -> tuple[MediaItem, ...]:
    """The vision items of a media segment, in order, from index values alone."""
    grid = grid_of(segment.width, segment.height, patch_limit_of(segment, vision), vision)
    if segment.type == "image":
        return (MediaItem(grid_thw=Grid(1, *grid), frames=(0,), timestamp_s=None),)
    times = segment.times
    num_units = times.num_units
    samples = list(times.sampled(num_samples(segment, vision.video_fps)))
    items = []
    for start in range(0, len(samples), vision.pos_emb_time):
        chunk = samples[start : start + vision.pos_emb_time]
        seen_before = start > 0 and samples[start - 1].frame == chunk[0].frame
        mark = chunk[0].time if seen_before else chunk[0].frame_start
        items.append(
            MediaItem(
                grid_thw=Grid(len(chunk), *grid),
                frames=tuple(sample.frame for sample in chunk),
                timestamp_s=mark * segment.duration_s / num_units,
            )
        )
    return tuple(items)


def num_samples(segment: MediaSegment, fps: float) -> int:
    """How often a video is looked at: `fps` times per second, but not more often than it has frames.

    Looks are evenly spread over the duration, the first at its first frame, and see what is on screen then.
    Which frames Kimi takes is not disclosed; this is our choice.
    """
    return min(segment.num_frames, max(1, round(segment.duration_s * fps)))


def grid_of(width: int, height: int, patch_limit: int, vision: VisionConfig) -> tuple[int, int]:
    """Rows and columns of patches after resizing and padding right and bottom to whole merged tokens."""
    new_width, new_height = resized_size(width, height, patch_limit, vision)
    factor = vision.patch_size * vision.merge_size
    return (
        -(-new_height // factor) * vision.merge_size,
        -(-new_width // factor) * vision.merge_size,
    )


def resized_size(width: int, height: int, patch_limit: int, vision: VisionConfig) -> tuple[int, int]:
    """Width and height in pixels after scaling to the limits, before padding.

    Scaled by min(1, sqrt(patch_limit / (w//p · h//p)), side·p/w, side·p/h) and cut to integers, never scaled
    up; a side keeps at least one pixel. Source: the released checkpoint's preprocessing code.
    """
    scale = _scale(width, height, patch_limit, vision)
    side_pixels = vision.side_patch_limit * vision.patch_size
    return (
        min(max(1, int(width * scale)), side_pixels),
        min(max(1, int(height * scale)), side_pixels),
    )


def patch_limit_of(segment: MediaSegment, vision: VisionConfig) -> int:
    """Most patches of one frame of the segment: images and video frames have different limits."""
    return vision.image_patch_limit if segment.type == "image" else vision.frame_patch_limit


def fits_aspect(segment: MediaSegment, vision: VisionConfig) -> bool:
    """Whether the short side keeps at least one pixel when the long side is scaled to the limits."""
    scale = _scale(segment.width, segment.height, patch_limit_of(segment, vision), vision)
    return min(segment.width, segment.height) * scale >= 1


def _scale(width: int, height: int, patch_limit: int, vision: VisionConfig) -> float:
    patch = vision.patch_size
    side_pixels = vision.side_patch_limit * patch
    num_patches = max(1, width // patch) * max(1, height // patch)
    return min(1.0, math.sqrt(patch_limit / num_patches), side_pixels / width, side_pixels / height)


def format_timestamp(seconds: float) -> str:
    """`hh:mm:ss.fff`, as it precedes every video chunk."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"
