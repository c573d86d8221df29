"""Whether a media file is what the index says, found by decoding all of it."""

from collections.abc import Iterator

from k25_train.data.decode.frames import probe_media
from k25_train.data.formats.index import bytes_crc32
from k25_train.data.formats.records import MediaSegment
from k25_train.errors import DataError


def media_faults(data: bytes, segment: MediaSegment) -> Iterator[str]:
    """What is wrong with it, to continue its name; at most one fault, the one that says most."""
    if not data:
        yield "is empty"
        return
    try:
        info = probe_media(data, segment.type, segment.format)
    except DataError as error:
        yield str(error)
        return
    if (info.width, info.height, info.num_frames) != (segment.width, segment.height, segment.num_frames):
        yield (
            f"is {info.width}x{info.height} in {info.num_frames} frame(s), the index says "
            f"{segment.width}x{segment.height} in {segment.num_frames}"
        )
    elif segment.frame_times and info.frame_times != segment.frame_times:
        yield "shows its frames at other times than the index says"
    elif segment.crc32 and bytes_crc32(data) != segment.crc32:
        yield "has another CRC-32 than the index says"
