"""From a sample to the tokens of a document: `[BOS] … [EOS]`, with every media item as Kimi writes it.
A conversation brings its own beginnings and ends, and has no such frame.

    image         <|media_begin|> "image" <|media_content|> <|media_pad|> x n <|media_end|>
    video chunk   "hh:mm:ss.fff" <|media_begin|> "video" <|media_content|> <|media_pad|> x n <|media_end|>

n is the item's number of merged patches. Lengths are known from the index; words are read and tokenised only
for the documents of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.data.augment.samples import Augmentation, NoAugmentation
from k25_train.data.byte_cache import ByteCache
from k25_train.data.decode.items import MediaItem, PlannedMedia, fits_aspect, format_timestamp, plan_media
from k25_train.data.formats.reader import SourceReader
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.tokenizer import Tokenizer

LONG_DOCUMENT_TOKENS = 4096
"""Documents of more tokens are encoded piece by piece; shorter ones as a whole, once for the pieces that
follow one another in the stream."""
NO_AUGMENTATION = NoAugmentation()
CACHED_BYTES = 2**26
"""What the documents that were encoded last may take. Our choice."""


@dataclass(frozen=True, slots=True, eq=False)
class DocumentTokens:
    """A document or a stretch of one, of L tokens."""

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
    """Knows the layout of one source's documents under one set of image limits; reads their words."""

    def __init__(
        self,
        reader: SourceReader,
        tokenizer: Tokenizer,
        vision: VisionConfig,
        *,
        frame: bool = True,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        """`tokenizer` must be the one that the index was counted with; `frame`: whether documents are put
        between [BOS] and [EOS] (`SourceHeader.frame`)."""
        self._reader = reader
        self._augmentation = augmentation
        self.directory = reader.directory
        self._tokenizer = tokenizer
        self._vision = vision
        self._encode = lru_cache(maxsize=4096)(lambda text: tuple(tokenizer.encode(text)))
        self._frame_tokens = int(frame)
        self._documents = ByteCache[DocumentTokens](
            CACHED_BYTES, lambda document: document.tokens.nbytes + document.is_target.nbytes
        )

    def clear(self) -> None:
        """Forget the documents encoded so far."""
        self._documents.clear()

    def media(self, record: SampleRecord) -> tuple[PlannedMedia, ...]:
        """The images and videos of a sample with their items, in the order of their placeholders."""
        return tuple(plan_media(segment, self._vision) for segment in record.media)

    def num_tokens(self, record: SampleRecord) -> int:
        """Length of the document, from the index alone."""
        items = (item for media in self.media(record) for item in media.items)
        num_media_tokens = sum(len(self._item_tokens(item)) for item in items)
        return 2 * self._frame_tokens + record.num_text_tokens + num_media_tokens

    def num_item_tokens(self, item: MediaItem) -> int:
        """Tokens of a vision item, with those around its placeholders."""
        return len(self._item_tokens(item))

    def placeholders(self, record: SampleRecord, media: tuple[PlannedMedia, ...]) -> np.ndarray:
        """[V] int64: where a document has the placeholders of vision tokens, from the index alone."""
        position = self._frame_tokens
        found = [np.zeros(0, dtype=np.int64)]
        planned = iter(media)
        for segment in record.segments:
            if isinstance(segment, TextSegment):
                position += segment.num_tokens
                continue
            for item in next(planned).items:
                # The last of an item's tokens ends it.
                position += len(self._item_tokens(item))
                found.append(np.arange(position - 1 - item.num_tokens, position - 1))
        return np.concatenate(found)

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

    def tokens(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int = 0, stop: int | None = None
    ) -> DocumentTokens:
        """Tokens `start` to `stop` of a document, all by default; `media` is what `media(record)` planned.

        Words that cannot be used, or do not fit the index, are its `failure`.
        """
        length = self.num_tokens(record)
        stop = length if stop is None else stop
        if length > LONG_DOCUMENT_TOKENS:
            return self._build(record, media, start, stop)
        whole = self._documents.get((record, media), lambda: self._build(record, media, 0, length))
        return DocumentTokens(whole.tokens[start:stop], whole.is_target[start:stop], whole.failure)

    def num_targets(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int, stop: int
    ) -> int:
        """How many of the tokens `start` to `stop` of a document count in the loss, from the index alone:
        what `tokens` finds where its words can be used."""
        position, found = self._frame_tokens, 0
        planned = iter(media)
        for segment in record.segments:
            if isinstance(segment, TextSegment):
                end = position + segment.num_tokens
                if segment.loss:
                    found += max(min(end, stop) - max(position, start), 0)
            else:
                end = position + sum(len(self._item_tokens(item)) for item in next(planned).items)
            position = end
        last = record.segments[-1]
        has_end = self._frame_tokens and start <= position < stop
        return found + bool(has_end and isinstance(last, TextSegment) and last.loss)

    def _build(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int, stop: int
    ) -> DocumentTokens:
        failure = None
        try:
            tokens, is_target = self._lay_out(record, media, start, stop, is_readable=True)
        except SampleError as error:
            # It keeps its place: planning counts on its length and its media.
            failure = error.reason
            tokens, is_target = self._lay_out(record, media, start, stop, is_readable=False)
        return DocumentTokens(np.array(tokens, dtype=np.int64), np.array(is_target, dtype=np.bool_), failure)

    def _lay_out(
        self,
        record: SampleRecord,
        media: tuple[PlannedMedia, ...],
        start: int,
        stop: int,
        *,
        is_readable: bool,
    ) -> tuple[list[int], list[bool]]:
        """Tokens of the stretch, and which are targets; of one that cannot be read, padding and none."""
        # 1. Document by segments, each with its first position; what lies outside of the stretch is cut off.
        tokens: list[int] = []
        is_target: list[bool] = []
        position = 0

        def add(count: int, of: Callable[[int, int], Sequence[int]], learned: bool) -> None:
            nonlocal position
            first, last = max(start - position, 0), min(stop - position, count)
            if first < last:
                tokens.extend(of(first, last))
                is_target.extend([learned and is_readable] * (last - first))
            position += count

        # 2. Words and media between the document's first and last token.
        add(self._frame_tokens, lambda first, last: [self._tokenizer.bos], False)
        planned = iter(media)
        for number, segment in enumerate(record.segments):
            if isinstance(segment, TextSegment):
                read = partial(self._words, record, media, number)
                add(segment.num_tokens, read if is_readable else self._padding, segment.loss)
            else:
                placeholders = [token for item in next(planned).items for token in self._item_tokens(item)]
                add(len(placeholders), partial(_between, placeholders), False)
        # The end is learned after words that are, so not after a prompt or an image.
        last = record.segments[-1]
        learned = isinstance(last, TextSegment) and last.loss
        add(self._frame_tokens, lambda first, last: [self._tokenizer.eos], learned)
        return tokens, is_target

    def _words(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], segment: int, start: int, stop: int
    ) -> Sequence[int]:
        """Tokens of a text, as it is true of the pictures as they are shown."""
        rewritten = self._augmentation.tokens(media[0].drawn) if media else {}
        if segment in rewritten:
            return rewritten[segment][start:stop]
        return self._reader.segment_tokens(record, segment, start, stop)

    def _padding(self, first: int, last: int) -> list[int]:
        return [self._tokenizer.pad] * (last - first)


def _between(tokens: list[int], first: int, last: int) -> list[int]:
    return tokens[first:last]
