"""From a sample to the tokens of a document: `[BOS] … [EOS]`, with every media item as Kimi writes it.

    image         <|media_begin|> "image" <|media_content|> <|media_pad|> x n <|media_end|>
    video chunk   "hh:mm:ss.fff" <|media_begin|> "video" <|media_content|> <|media_pad|> x n <|media_end|>

n is the item's number of merged patches. Lengths are known from the index; words are read and tokenised only
for the documents of a batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from k25_train.config.model import VisionConfig
from k25_train.data.decode.items import MediaItem, fits_aspect, format_timestamp, plan_items
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_CACHED_DOCUMENTS = 256
"""Tokenised documents kept: long texts are cut into pieces that follow one another in the stream."""


@dataclass(frozen=True, slots=True, eq=False)
class DocumentTokens:
    """A whole document."""

    tokens: np.ndarray
    """[L] int64."""
    is_target: np.ndarray
    """[L] bool: whether predicting this token counts in the loss."""


def media_segments(record: SampleRecord) -> tuple[MediaSegment, ...]:
    """The images and videos of a sample, in order."""
    return tuple(segment for segment in record.segments if isinstance(segment, MediaSegment))


def find_defect(record: SampleRecord, vision: VisionConfig) -> str | None:
    """Why a sample cannot be used, as far as the index shows it; None if nothing is wrong."""
    media = media_segments(record)
    if record.kind == "text":
        if media:
            return "its kind is text but it has media"
        return None if record.num_text_tokens else "its text is empty"
    if not media:
        return f"its kind is {record.kind} but it has no image and no video"
    for segment in media:
        if segment.num_bytes == 0:
            return f"its {segment.type} file is empty"
        if not fits_aspect(segment, vision):
            return (
                f"its {segment.type} has {segment.width}x{segment.height} pixels: scaled to the limit of "
                f"{vision.side_patch_limit} patches a side, the short side has less than one pixel"
            )
    return None


class DocumentBuilder:
    """Knows the layout of documents under one tokenizer and one set of image limits; reads their words."""

    def __init__(self, reader: ShardReader, tokenizer: Tokenizer, vision: VisionConfig) -> None:
        """`tokenizer` must be the one that the index was counted with (`load_dataset` checks it)."""
        self._reader = reader
        self.directory = reader.directory
        self._tokenizer = tokenizer
        self._vision = vision
        self._encode = lru_cache(maxsize=4096)(lambda text: tuple(tokenizer.encode(text)))
        self.tokens = lru_cache(maxsize=_CACHED_DOCUMENTS)(self._build_tokens)
        """`tokens(record) -> DocumentTokens`, cached. Raises DataError if the words do not fit the index."""

    def items(self, record: SampleRecord) -> tuple[MediaItem, ...]:
        """All vision items of a sample, in the order of their placeholders."""
        return tuple(item for segment in media_segments(record) for item in plan_items(segment, self._vision))

    def num_tokens(self, record: SampleRecord) -> int:
        """Length of the document, from the index alone."""
        return 2 + record.num_text_tokens + sum(len(self._item_tokens(item)) for item in self.items(record))

    def _item_tokens(self, item: MediaItem) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        name = "image"
        timestamp: tuple[int, ...] = ()
        if item.timestamp_s is not None:
            name, timestamp = "video", self._encode(format_timestamp(item.timestamp_s))
        return (
            *timestamp,
            tokenizer.media_begin,
            *self._encode(name),
            tokenizer.media_content,
            *[tokenizer.media_pad] * item.num_tokens,
            tokenizer.media_end,
        )

    def _build_tokens(self, record: SampleRecord) -> DocumentTokens:
        tokens = [self._tokenizer.bos]
        is_target = [False]
        for segment, text in zip(record.segments, self._reader.read_texts(record), strict=True):
            if isinstance(segment, TextSegment):
                part = self._tokenizer.encode(text)
                if len(part) != segment.num_tokens:
                    raise DataError(
                        f"{self._reader.directory}/{record.shard}, sample {record.key}: a text has "
                        f"{len(part)} tokens, the index says {segment.num_tokens}. Build the shard set again."
                    )
                tokens += part
                is_target += [segment.loss] * len(part)
            else:
                for item in plan_items(segment, self._vision):
                    part = list(self._item_tokens(item))
                    tokens += part
                    is_target += [False] * len(part)
        last = record.segments[-1]
        tokens.append(self._tokenizer.eos)
        is_target.append(isinstance(last, TextSegment) and last.loss)
        return DocumentTokens(np.array(tokens, dtype=np.int64), np.array(is_target, dtype=np.bool_))
