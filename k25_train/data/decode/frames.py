"""Decoders: from the bytes of an image or video file to frames.

Images, GIF, WebP and APNG are decoded by Pillow, video containers by PyAV. NVIDIA DALI 2.4 was measured for
this on the CPU and not taken: it drops the transparency of palette PNGs without a word, cannot decode GIF nor
grey images with alpha, hangs in a process forked after its first use, takes 1.5 ms where Pillow takes 0.7 ms
for a 250x200 JPEG, and adds 130 MB to every rank.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence

from k25_train.errors import DataError

PILLOW_VIDEO_FORMATS = ("gif", "webp", "png", "apng")
"""Animated image formats, decoded frame by frame by Pillow; every other video format is PyAV's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """Native sizes of a media file, as the index stores them."""

    width: int
    height: int
    num_frames: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame, valid until the next one is requested."""

    size: tuple[int, int]
    """Width and height."""
    pixel_format: str
    """The decoder's name of it."""
    duration_s: float
    """How long it is shown; 0 for an image."""
    to_rgb: Callable[[], Image.Image]
    """Converts it, which is costly."""


def probe_media(data: bytes, media_type: str, file_format: str) -> MediaInfo:
    """Sizes of a media file, found by decoding all of it. Raises DataError with the reason if that fails."""
    with DecoderErrors():
        frames = [
            (frame.to_rgb().size, frame.duration_s) for frame in decode_frames(data, media_type, file_format)
        ]
        if not frames:
            raise DataError("the video has no frames")
        (width, height), _ = frames[0]
        return MediaInfo(
            width=width,
            height=height,
            num_frames=len(frames),
            duration_s=sum((seconds for _, seconds in frames), 0.0),
        )


def decode_frames(data: bytes, media_type: str, file_format: str) -> Iterator[Frame]:
    """All frames of a file, in order; one for an image. Use it within `DecoderErrors`."""
    if media_type == "image":
        image = _decode_image(data)
        yield Frame(image.size, image.mode, 0.0, lambda: image)
    elif file_format in PILLOW_VIDEO_FORMATS:
        yield from _pillow_frames(data)
    else:
        yield from _container_frames(data)


class DecoderErrors:
    """Turns errors of decoders on broken files into DataError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # On corrupt input Pillow and PyAV raise almost any exception (OSError, SyntaxError, ValueError,
        # struct.error, IndexError, zlib.error …), so all but our own and interrupts mean "does not decode".
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(f"does not decode ({type(error).__name__}: {error})") from error


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


def _pillow_frames(data: bytes) -> Iterator[Frame]:
    with Image.open(io.BytesIO(data)) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            yield Frame(frame.size, frame.mode, frame.info.get("duration", 0) / 1000, partial(_to_rgb, frame))


def _container_frames(data: bytes) -> Iterator[Frame]:
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        if stream.average_rate is None:
            raise DataError("the video stream states no frame rate")
        stream.thread_count = 1  # the ranks of a node share its cores
        for frame in container.decode(stream):
            size = (frame.width, frame.height)
            yield Frame(size, frame.format.name, float(1 / stream.average_rate), frame.to_image)
