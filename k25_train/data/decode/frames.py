"""Decoders: from the bytes of an image or video file to frames.

Images and animated images are decoded by Pillow, video containers by PyAV: the reference. `decoder.py` has
NVIDIA DALI do what it does faithfully. Measured with DALI 2.4 on the CPU, all of which still holds and
decides what `routing.py` keeps from it: it drops the transparency of palette PNGs without a word, cannot
decode GIF nor grey images with alpha, hangs in a process forked after its first use, takes 1.5 ms alone where
Pillow takes 0.7 ms for a 250x200 JPEG, and needs 130 MB.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from k25_train.data.decode.clock import frame_times
from k25_train.data.decode.containers import container_frames
from k25_train.data.decode.frame import Frame
from k25_train.data.decode.pictures import animation_frames, picture_frame
from k25_train.errors import DataError

PILLOW_VIDEO_FORMATS = ("gif", "webp", "png", "apng", "avif")
"""Animated image formats, decoded frame by frame by Pillow; every other video format is PyAV's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """Sizes of a media file as it is shown, as the index stores them."""

    width: int
    height: int
    num_frames: int
    duration_s: float
    frame_times: str = ""
    """Of a video, `str(FrameTimes)`; empty for an image."""


def probe_media(data: bytes, media_type: str, file_format: str) -> MediaInfo:
    """Sizes of a media file, found by decoding all of it. Raises DataError with the reason if that fails."""
    with DecoderErrors():
        sizes, shown = [], []
        pixel_formats: set[str] = set()
        for frame in decode_frames(data, media_type, file_format):
            # What cannot be converted is refused here, as it is when it is read.
            if frame.pixel_format not in pixel_formats:
                frame.to_rgb()
                pixel_formats.add(frame.pixel_format)
            sizes.append(frame.size)
            shown.append(frame.shown)
        if not sizes:
            raise DataError("the video has no frames")
        changed = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
        if changed is not None:
            raise DataError(
                f"changes its size from {_by(sizes[0])} to {_by(sizes[changed])} at frame {changed}"
            )
        width, height = sizes[0]
        if media_type == "image":
            return MediaInfo(width=width, height=height, num_frames=1, duration_s=0.0)
        times = frame_times(shown)
        return MediaInfo(
            width=width,
            height=height,
            num_frames=len(sizes),
            duration_s=times.duration_s,
            frame_times=str(times),
        )


def decode_frames(data: bytes, media_type: str, file_format: str, *, legacy: bool = False) -> Iterator[Frame]:
    """All frames of a file, in order; one for an image. Use it within `DecoderErrors`.

    `legacy` decodes as an index of version 1 was meant: videos neither turned nor stretched, no guess at
    the colour matrix of HD, HDR as it is; images without their ICC profile or gamma, animations
    as Pillow composes them.
    """
    if media_type == "image":
        yield picture_frame(data, legacy=legacy)
    elif file_format in PILLOW_VIDEO_FORMATS:
        yield from animation_frames(data, legacy=legacy)
    else:
        yield from container_frames(data, legacy=legacy)


class DecoderErrors:
    """Turns errors of decoders on broken files into DataError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # On corrupt input Pillow and PyAV raise almost any exception (OSError, SyntaxError, ValueError,
        # struct.error, IndexError, zlib.error …), so all but our own and interrupts mean "does not decode".
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(f"does not decode ({type(error).__name__}: {error})") from error


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
