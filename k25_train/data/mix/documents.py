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
from k25_train.data.decode.items import MediaItem, PlannedMedia, fits_aspect, format_timestamp, plan_media
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.tokenizer import Tokenizer

_CACHED_DOCUMENTS = 256
"""Tokenised documents kept: long texts are cut into pieces that follow one another in the stream."""


@dataclass(frozen=True, slots=True, eq=False)
class DocumentTokens:
    """A whole document."""

    tokens: np.ndarray
    """[L] int64."""
    is_target: np.ndarray
    """[L] bool: whether predicting this token counts in the loss."""
    failure: str | None
    """Why its words cannot be used, in which case they are padding and nothing is a target."""


def find_defect(record: SampleRecord, vision: VisionConfig) -> str | None:
    """Why a sample cannot be used, as far as the index shows it; None if nothing is wrong."""
    media = record.media
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
                f"{vision.side_patch_limit} patches per side, the short side has less than one pixel"
            )
    return None


def has_target(record: SampleRecord) -> bool:
    """Whether anything of a sample is learned: a text with a loss, or the end after one without words."""
    segments = record.segments
    last = segments[-1]
    return any(
        segment.loss and (segment.num_tokens > 0 or segment is last)
        for segment in segments
        if isinstance(segment, TextSegment)
    )


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
        """`tokens(record, media) -> DocumentTokens`, cached; `media` is what `media(record)` has planned.

        Words that cannot be used, or do not fit the index, are its `failure`.
        """

    def media(self, record: SampleRecord) -> tuple[PlannedMedia, ...]:
        """The images and videos of a sample with their items, in the order of their placeholders."""
        return tuple(plan_media(segment, self._vision) for segment in record.media)

    def num_tokens(self, record: SampleRecord) -> int:
        """Length of the document, from the index alone."""
        items = (item for media in self.media(record) for item in media.items)
        return 2 + record.num_text_tokens + sum(len(self._item_tokens(item)) for item in items)

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

    def _build_tokens(self, record: SampleRecord, media: tuple[PlannedMedia, ...]) -> DocumentTokens:
        # A sample without usable words keeps its place: planning counts on its length and its media.
        failure = None
        try:
            words = self._words(record)
        except SampleError as error:
            failure = error.reason
            words = [[self._tokenizer.pad] * segment.num_tokens for segment in _texts(record)]
        learned = failure is None

        tokens = [self._tokenizer.bos]
        is_target = [False]
        texts, planned = iter(words), iter(media)
        for segment in record.segments:
            if isinstance(segment, TextSegment):
                tokens += next(texts)
                is_target += [segment.loss and learned] * segment.num_tokens
            else:
                placeholders = [token for item in next(planned).items for token in self._item_tokens(item)]
                tokens += placeholders
                is_target += [False] * len(placeholders)
        # The end is learned after words that are, so not after a prompt or an image.
        last = record.segments[-1]
        tokens.append(self._tokenizer.eos)
        is_target.append(isinstance(last, TextSegment) and last.loss and learned)
        return DocumentTokens(np.array(tokens, dtype=np.int64), np.array(is_target, dtype=np.bool_), failure)

    def _words(self, record: SampleRecord) -> list[list[int]]:
        """The tokens of each text segment. Raises SampleError if they are not as many as the index says."""
        found = []
        for segment, text in zip(record.segments, self._reader.read_texts(record), strict=True):
            if not isinstance(segment, TextSegment):
                continue
            try:
                tokens = self._tokenizer.encode(text)
            except RuntimeError as error:
                raise SampleError(str(error)) from error
            if len(tokens) != segment.num_tokens:
                raise SampleError(f"a text has {len(tokens)} tokens, the index says {segment.num_tokens}")
            found.append(tokens)
        return found


def _texts(record: SampleRecord) -> list[TextSegment]:
    return [segment for segment in record.segments if isinstance(segment, TextSegment)]
