"""Frames of video containers, decoded by PyAV, as a viewer shows them."""

import io
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import cast

import av
from av.codec.context import CodecContext
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from PIL import Image

from k25_train.data.decode.clock import Clock, Shown
from k25_train.data.decode.cropping import container_cropping
from k25_train.data.decode.display import AS_CODED, Display, pixel_aspect_of, turn_of
from k25_train.data.decode.frame import Frame
from k25_train.data.decode.video_colour import to_rgb
from k25_train.errors import DataError

_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
"""The decoder stops at damage that it notices, instead of painting over it from other frames."""
_NO_OTHER_FILES = {"protocol_whitelist": "none"}
"""A playlist in place of a video names other files, and FFmpeg would open them."""
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""WebM keeps transparency in a second picture, which only these decoders read."""


def container_frames(data: bytes, *, legacy: bool) -> Iterator[Frame]:
    """All frames of a video file in the order of display, turned and stretched unless `legacy`.

    Raises DataError for a file without exactly one video.
    """
    cropping = container_cropping(data)
    with av.open(io.BytesIO(data), mode="r", container_options=_NO_OTHER_FILES) as container:
        stream = _video_stream(container)
        clock = _clock(stream)
        aspect = pixel_aspect_of(_fraction(stream.sample_aspect_ratio))
        first_stamp: int | None = None
        start_s = -clock.interval_s
        for frame in _decoded(container, stream):
            if frame.is_corrupt:
                raise DataError("has a damaged frame")
            # A frame without a stamp follows the one before it at the stated rate.
            if frame.pts is None:
                start_s += clock.interval_s
            else:
                # Of a stream that begins without stamps the first one says when the stream began.
                if first_stamp is None:
                    first_stamp = frame.pts - round((start_s + clock.interval_s) / clock.tick_s)
                start_s = (frame.pts - first_stamp) * clock.tick_s
            display = AS_CODED if legacy else Display(_turn(frame), aspect, cropping)
            # Without stamps the duration comes from another source than the rate, and need not agree with it.
            ticks = frame.duration if frame.pts is not None else 0
            shown = Shown(start_s, (ticks or 0) * clock.tick_s, clock)
            size = display.size(frame.width, frame.height)
            yield Frame(size, _pixel_format(frame), shown, partial(_picture, frame, display, legacy))


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not streams:
        covers = len(container.streams.video)
        raise DataError("has no video, only cover art" if covers else "has no video stream")
    if len(streams) > 1:
        raise DataError(f"has {len(streams)} video streams, and nothing says which one is meant")
    return streams[0]


def _clock(stream: av.VideoStream) -> Clock:
    rate = _fraction(stream.average_rate) or _fraction(stream.guessed_rate)
    if not rate:
        raise DataError("the video stream states no frame rate")
    return Clock(1 / rate, Fraction(stream.time_base.numerator, stream.time_base.denominator))


def _fraction(value: object) -> Fraction | None:
    numerator, denominator = getattr(value, "numerator", 0), getattr(value, "denominator", 0)
    return Fraction(numerator, denominator) if denominator else None


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    context = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and stream.codec.name in _ALPHA_DECODERS:
        context = cast(VideoCodecContext, CodecContext.create(_ALPHA_DECODERS[stream.codec.name], "r"))
    context.options = _STRICT
    context.thread_count = 1  # the ranks of a node share its cores
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError("has a damaged packet")
        yield from context.decode(packet)


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return None if matrix is None else turn_of(bytes(matrix))


def _pixel_format(frame: av.VideoFrame) -> str:
    tags = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
    return f"{frame.format.name} {tags}"


def _picture(frame: av.VideoFrame, display: Display, legacy: bool) -> Image.Image:
    return display.place(to_rgb(frame, legacy=legacy))
