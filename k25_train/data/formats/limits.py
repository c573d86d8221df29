"""What no index may state: places outside of the shard, and sizes that its bytes cannot hold.

Planning allocates and loops by these numbers before a shard is opened, so each is held against the size of
the shard, which is compared with the file's.
"""

from k25_train.data.formats.records import SampleRecord, TextSegment

_FEW_FRAMES = 1000
"""Frames that even a file of no bytes may claim: it does not decode, which costs nothing."""


def check_sizes(record: SampleRecord, shard_bytes: int) -> None:
    """Raises ValueError or TypeError, naming the field, for a record that a shard of this size cannot hold.

    A token is at least one byte of text, which is at least one of JSON; a frame is at least one of its file.
    """
    for name in ("key", "kind", "source", "crc32"):
        check_text(getattr(record, name), name)
    check_place(record.offset, record.num_bytes, shard_bytes)
    num_tokens = 0
    for segment in record.segments:
        if isinstance(segment, TextSegment):
            check_count(segment.num_tokens, "num_tokens")
            if not isinstance(segment.loss, bool):
                raise TypeError(f"loss={segment.loss!r} is neither true nor false")
            num_tokens += segment.num_tokens
            continue
        for name in ("width", "height", "num_frames"):
            check_count(getattr(segment, name), name)
        for name in ("format", "frame_times", "crc32"):
            check_text(getattr(segment, name), name)
        check_place(segment.offset, segment.num_bytes, shard_bytes)
        if segment.num_frames > max(_FEW_FRAMES, segment.num_bytes):
            raise ValueError(
                f"num_frames={segment.num_frames} are more than the file's {segment.num_bytes} bytes"
            )
    if num_tokens > record.num_bytes:
        raise ValueError(f"num_tokens={num_tokens} in all are more than the text's {record.num_bytes} bytes")


def check_count(value: object, name: str) -> None:
    """Raises TypeError or ValueError, naming the field, unless `value` is a whole number of 0 or more."""
    if type(value) is not int:
        raise TypeError(f"{name}={value!r} is no whole number")
    if value < 0:
        raise ValueError(f"{name}={value} is negative")


def check_text(value: object, name: str) -> None:
    """Raises TypeError, naming the field, unless `value` is a text that may be printed."""
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{name}={value!r} is no text, or has control characters")


def check_place(offset: object, num_bytes: object, shard_bytes: int) -> None:
    """Raises TypeError or ValueError unless the bytes lie in a shard of this size."""
    check_count(offset, "offset")
    check_count(num_bytes, "bytes")
    end = offset + num_bytes  # type: ignore[operator]
    if end > shard_bytes:
        raise ValueError(f"offset={offset}, bytes={num_bytes} end behind the shard's {shard_bytes} bytes")
