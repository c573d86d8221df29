"""What planning knows of a source's items: one array per value, in memory or memory-mapped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25_train.data.formats.records import MEDIA_TYPES, SampleRecord
from k25_train.data.formats.source_index import SourceIndex


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemColumns:
    """N items with M images and videos."""

    text_tokens: np.ndarray
    """[N]: tokens of an item's texts, without special tokens."""
    first_media: np.ndarray | None
    """[N + 1]: where the media of each item begin; None if none has any."""
    media_width: np.ndarray
    """[M]: pixels."""
    media_height: np.ndarray
    """[M]: pixels."""
    media_bytes: np.ndarray
    """[M]: length of the file."""
    media_type: np.ndarray
    """[M]: position of its type in `records.MEDIA_TYPES`."""
    misfits: np.ndarray | None
    """[N] bool: items that are not of the kind that they are listed as; None if none can be."""

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.text_tokens)

    @property
    def has_media(self) -> bool:
        """Whether any item has an image or a video."""
        return self.first_media is not None and int(self.first_media[-1]) > int(self.first_media[0])

    @classmethod
    def of_index(cls, index: SourceIndex, first: int, stop: int) -> "ItemColumns":
        """Those of items `first` to `stop` of an index, as they are mapped."""
        columns, nothing = index.columns, np.zeros(0, dtype=np.uint8)
        media = None if index.first_media is None else index.first_media[first : stop + 1]
        return cls(
            text_tokens=index.text_tokens[first:stop],
            first_media=media,
            media_width=columns.get("media_width", nothing),
            media_height=columns.get("media_height", nothing),
            media_bytes=columns.get("media_bytes", nothing),
            media_type=columns.get("media_type", nothing),
            misfits=None,
        )

    @classmethod
    def of(cls, records: Sequence[SampleRecord]) -> "ItemColumns":
        """Those of samples in memory."""
        # A text that has media cannot be used, and makes no source of texts one with media.
        by_record = [() if record.kind == "text" else record.media for record in records]
        media = [segment for of_record in by_record for segment in of_record]
        counts = [len(of_record) for of_record in by_record]
        return cls(
            text_tokens=np.array([record.num_text_tokens for record in records], dtype=np.int64),
            first_media=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            media_width=np.array([each.width for each in media], dtype=np.int64),
            media_height=np.array([each.height for each in media], dtype=np.int64),
            media_bytes=np.array([each.num_bytes for each in media], dtype=np.int64),
            media_type=np.array([MEDIA_TYPES.index(each.type) for each in media], dtype=np.uint8),
            misfits=np.array(
                [(record.kind == "text") == bool(record.media) for record in records], dtype=np.bool_
            ),
        )
