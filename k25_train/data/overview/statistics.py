"""Numbers of a source from its index alone: counts, lengths, sizes of media.

A corpus of billions is sampled: `SAMPLED` items, evenly spread, so that it costs the same for any.
"""

from dataclasses import dataclass

import numpy as np

from k25_train.data.formats.records import MEDIA_TYPES
from k25_train.data.formats.source_index import SourceIndex

SAMPLED = 1_000_000
"""Items, and media, that are looked at at most. Our choice."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceStatistics:
    """What there is of one source. Arrays are of the items or media that were looked at."""

    name: str
    format: str
    num_items: int
    num_tokens: int
    """Text tokens."""
    num_media: int
    num_shards: int
    num_bytes: int
    """Of its shards."""
    text_tokens: np.ndarray
    """[items] u32, text tokens of each."""
    media_per_item: np.ndarray
    """[items] of samples with media, how many they have."""
    width: np.ndarray
    """[media] u32, pixels."""
    height: np.ndarray
    """[media] u32, pixels."""
    is_video: np.ndarray
    """[media] bool."""
    duration_s: np.ndarray
    """[videos] float64."""
    formats: tuple[tuple[str, int], ...]
    """(file format, how many of the media that were looked at), the most frequent first."""

    @property
    def is_sampled(self) -> bool:
        """Whether not all items were looked at."""
        return len(self.text_tokens) < self.num_items

    @property
    def aspect_ratio(self) -> np.ndarray:
        """[media] float64, width by height."""
        return np.asarray(self.width / np.maximum(self.height, 1))


def statistics(name: str, index: SourceIndex) -> SourceStatistics:
    """What an index says of its source; reads at most `SAMPLED` items of it."""
    header, columns = index.header, index.columns
    items = _spread(len(index))
    media = _spread(header.num_media)
    per_item = np.zeros(0, dtype=np.int64)
    if index.first_media is not None:
        per_item = (index.first_media[items + 1] - index.first_media[items]).astype(np.int64)
        per_item = per_item[per_item > 0]

    def of_media(column: str) -> np.ndarray:
        return np.asarray(columns[column][media] if header.num_media else np.zeros(0, dtype=np.int64))

    is_video = of_media("media_type") == MEDIA_TYPES.index("video")
    numbers, counts = np.unique(of_media("media_format"), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return SourceStatistics(
        name=name,
        format=header.format,
        num_items=len(index),
        num_tokens=header.num_tokens,
        num_media=header.num_media,
        num_shards=header.num_shards,
        num_bytes=int(columns["shard_bytes"].sum()),
        text_tokens=np.asarray(index.text_tokens[items]),
        media_per_item=per_item,
        width=of_media("media_width"),
        height=of_media("media_height"),
        is_video=is_video,
        duration_s=of_media("media_duration_s")[is_video],
        formats=tuple((header.media_formats[numbers[i]], int(counts[i])) for i in order),
    )


def _spread(count: int) -> np.ndarray:
    """All numbers below `count`, or `SAMPLED` of them, evenly spread."""
    if count <= SAMPLED:
        return np.arange(count)
    return np.arange(SAMPLED) * count // SAMPLED
