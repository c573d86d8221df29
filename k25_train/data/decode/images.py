"""From native image and video files to patches, at native resolution as K2.5's preprocessing does it.

Sizes are planned from the index alone (`plan_items`); files are decoded only where their pixels are needed
(`load_patches`). Limits are those of the released checkpoint's preprocessor, from the vision config.

Images, GIF, WebP and APNG are decoded by Pillow, video containers by PyAV. NVIDIA DALI 2.4 was measured for
this on the CPU and not taken: it drops the transparency of palette PNGs without a word, cannot decode GIF nor
grey images with alpha, hangs in a process forked after its first use, takes 1.5 ms where Pillow takes 0.7 ms
for a 250x200 JPEG, and adds 130 MB to every rank.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import av
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from k25_train.config.model import VisionConfig
from k25_train.data.formats.index import MediaSegment
from k25_train.errors import DataError
from parallel.dep.grid import Grid

PILLOW_VIDEO_FORMATS = ("gif", "webp", "png", "apng")
"""Animated image formats, decoded frame by frame by Pillow; every other video format is PyAV's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """Native sizes of a media file, as the index stores them."""

    width: int
    height: int
    num_frames: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaItem:
    """What the tower sees as one item: an image, or a chunk of at most `pos_emb_time` video frames."""

    grid_thw: Grid
    """Frames, rows and columns of patches, padding included."""
    frames: tuple[int, ...]
    """Positions of its frames in the file; (0,) for an image."""
    timestamp_s: float | None
    """Time of the first frame of a video chunk; None for an image."""

    @property
    def num_patches(self) -> int:
        """t x h x w."""
        return self.grid_thw.num_patches

    @property
    def num_tokens(self) -> int:
        """Tokens of the language model: 2x2 patches merged, time pooled, hence independent of t."""
        return self.grid_thw.num_tokens


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


def grid_of(width: int, height: int, patch_limit: int, vision: VisionConfig) -> tuple[int, int]:
    """Rows and columns of patches after resizing and padding right and bottom to whole merged tokens."""
    new_width, new_height = resized_size(width, height, patch_limit, vision)
    factor = vision.patch_size * vision.merge_size
    return (
        -(-new_height // factor) * vision.merge_size,
        -(-new_width // factor) * vision.merge_size,
    )


def patch_limit_of(segment: MediaSegment, vision: VisionConfig) -> int:
    """Most patches of one frame of the segment: images and video frames have different limits."""
    return vision.image_patch_limit if segment.type == "image" else vision.frame_patch_limit


def sampled_frames(num_frames: int, duration_s: float, fps: float) -> tuple[int, ...]:
    """Positions of the frames used: `fps` for each second, evenly spread, at least one, none twice.

    Which frames Kimi takes is not disclosed; evenly spread from the first is our choice.
    """
    num_sampled = min(num_frames, max(1, round(duration_s * fps)))
    return tuple(i * num_frames // num_sampled for i in range(num_sampled))


def plan_items(segment: MediaSegment, vision: VisionConfig) -> tuple[MediaItem, ...]:
    """The vision items of a media segment, in order, from index values alone."""
    grid = grid_of(segment.width, segment.height, patch_limit_of(segment, vision), vision)
    if segment.type == "image":
        return (MediaItem(grid_thw=Grid(1, *grid), frames=(0,), timestamp_s=None),)
    frames = sampled_frames(segment.num_frames, segment.duration_s, vision.video_fps)
    chunks = [frames[i : i + vision.pos_emb_time] for i in range(0, len(frames), vision.pos_emb_time)]
    return tuple(
        MediaItem(
            grid_thw=Grid(len(chunk), *grid),
            frames=chunk,
            timestamp_s=chunk[0] * segment.duration_s / segment.num_frames,
        )
        for chunk in chunks
    )


def fits_aspect(segment: MediaSegment, vision: VisionConfig) -> bool:
    """Whether the short side keeps at least one pixel when the long side is scaled to the limits."""
    scale = _scale(segment.width, segment.height, patch_limit_of(segment, vision), vision)
    return min(segment.width, segment.height) * scale >= 1


def format_timestamp(seconds: float) -> str:
    """`hh:mm:ss.fff`, as it stands before every video chunk."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def probe_media(data: bytes, media_type: str, file_format: str) -> MediaInfo:
    """Sizes of a media file, found by decoding all of it. Raises DataError with the reason if that fails."""
    with _DecoderErrors():
        if media_type == "image":
            width, height = _decode_image(data).size
            return MediaInfo(width=width, height=height, num_frames=1, duration_s=0.0)
        sizes_and_durations = [
            (frame.to_rgb().size, frame.duration_s) for frame in _video_frames(data, file_format)
        ]
        if not sizes_and_durations:
            raise DataError("the video has no frames")
        (width, height), _ = sizes_and_durations[0]
        return MediaInfo(
            width=width,
            height=height,
            num_frames=len(sizes_and_durations),
            duration_s=sum(seconds for _, seconds in sizes_and_durations),
        )


def load_patches(
    data: bytes, segment: MediaSegment, vision: VisionConfig, positions: Sequence[int] | None = None
) -> Tensor:
    """Decode a media file into the patches of its items, one after another; of those at `positions`, which
    ascend, where they are given.

    Returns [P, 3*p*p] float32 (p = patch size) in rows ordered (t, h, w), each patch channel-first, values
    (x/255 - 0.5)/0.5; padding is black, i.e. -1. Raises DataError with the reason if the file does not decode
    or is not of the size that the index says, the same whatever the positions.
    """
    limit = patch_limit_of(segment, vision)
    size = resized_size(segment.width, segment.height, limit, vision)
    grid = grid_of(segment.width, segment.height, limit, vision)
    items = plan_items(segment, vision)
    chosen = items if positions is None else [items[position] for position in positions]
    wanted = {frame for item in chosen for frame in item.frames}
    patches: list[Tensor] = []
    pixel_formats: set[str] = set()
    num_frames = 0
    # Every frame is decoded, whichever are wanted: a file that breaks after them, or has another number of
    # frames than the index says, has to fail on every rank that holds a part of it, as it does in one process
    # that holds all. What a frame is made into is costly too and done of those alone that are wanted; only a
    # pixel format without a way to RGB can make that fail, so each format is converted once.
    with _DecoderErrors():
        for frame in _decode_segment(data, segment):
            if frame.size != (segment.width, segment.height):
                raise DataError(
                    f"decodes to {frame.size[0]}x{frame.size[1]} pixels, the index says "
                    f"{segment.width}x{segment.height}"
                )
            if num_frames in wanted or frame.pixel_format not in pixel_formats:
                image = frame.to_rgb()
                pixel_formats.add(frame.pixel_format)
            if num_frames in wanted:
                resized = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
                patches.append(_patchify(np.asarray(resized), grid, vision.patch_size))
            num_frames += 1
    if num_frames != segment.num_frames:
        raise DataError(f"decodes to {num_frames} frame(s), the index says {segment.num_frames}")
    return torch.cat(patches)


def _scale(width: int, height: int, patch_limit: int, vision: VisionConfig) -> float:
    patch = vision.patch_size
    side_pixels = vision.side_patch_limit * patch
    num_patches = max(1, width // patch) * max(1, height // patch)
    return min(1.0, math.sqrt(patch_limit / num_patches), side_pixels / width, side_pixels / height)


class _DecoderErrors:
    """Turns what decoders raise on broken files into DataError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # On corrupt input Pillow and PyAV raise almost any exception (OSError, SyntaxError, ValueError,
        # struct.error, IndexError, zlib.error …), so all but our own and interrupts mean "does not decode".
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(f"does not decode ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True)
class _Frame:
    """A decoded frame, good until the next one is asked for."""

    size: tuple[int, int]
    """Width and height."""
    pixel_format: str
    duration_s: float
    to_rgb: Callable[[], Image.Image]


def _decode_segment(data: bytes, segment: MediaSegment) -> Iterator[_Frame]:
    """Frames of the file; one for an image."""
    if segment.type == "image":
        image = _decode_image(data)
        yield _Frame(image.size, image.mode, 0.0, lambda: image)
    else:
        yield from _video_frames(data, segment.format)


def _decode_image(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB; transparent areas become white, as on a page."""
    if image.mode.startswith("I;16"):
        # Pillow clips instead of scaling 16-bit grey.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    rgb = Image.new("RGB", rgba.size, "white")
    rgb.paste(rgba, mask=rgba.getchannel("A"))
    return rgb


def _video_frames(data: bytes, file_format: str) -> Iterator[_Frame]:
    return _pillow_frames(data) if file_format in PILLOW_VIDEO_FORMATS else _container_frames(data)


def _pillow_frames(data: bytes) -> Iterator[_Frame]:
    with Image.open(io.BytesIO(data)) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            yield _Frame(
                frame.size, frame.mode, frame.info.get("duration", 0) / 1000, partial(_to_rgb, frame)
            )


def _container_frames(data: bytes) -> Iterator[_Frame]:
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        if stream.average_rate is None:
            raise DataError("the video stream states no frame rate")
        stream.thread_count = 1  # the ranks of a node share its cores
        for frame in container.decode(stream):
            size = (frame.width, frame.height)
            yield _Frame(size, frame.format.name, float(1 / stream.average_rate), frame.to_image)


def _patchify(frame: np.ndarray, grid: Sequence[int], patch: int) -> Tensor:
    """[H, W, 3] uint8 -> [h*w, 3*p*p] float32: padded, normalised, cut into channel-first patches."""
    rows, columns = grid
    padded = np.zeros((rows * patch, columns * patch, 3), dtype=np.uint8)
    padded[: frame.shape[0], : frame.shape[1]] = frame
    pixels = torch.from_numpy(padded).view(rows, patch, columns, patch, 3).permute(0, 2, 4, 1, 3)
    patches = pixels.reshape(rows * columns, 3 * patch * patch).to(torch.float32)
    return patches.div_(255).sub_(0.5).div_(0.5)
