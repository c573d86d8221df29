"""A sample's random changes: how its pictures are shown, and the texts that go with that.

Pictures and words of a sample are read by different ranks. Each of them computes all of this again, from the
sample's words and its key, so they agree without a message.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from k25_train.config.data import AugmentConfig
from k25_train.data.augment.draws import colours, crop, is_mirrored
from k25_train.data.augment.rewriting import corners, rewritten
from k25_train.data.byte_cache import ByteCache
from k25_train.data.decode.items import AS_STORED, Drawn
from k25_train.data.decode.view import AS_IT_IS, View
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError, Words

KEPT_BYTES = 2**24
"""What samples that were changed last may take. Our choice."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What becomes of a sample."""

    views: tuple[View, ...]
    """Of each of its images and videos, which share one in all frames."""
    tokens: Mapping[int, Sequence[int]]
    """Segment -> its tokens, of the texts that are rewritten."""


AS_IT_WAS = Changed((), {})


class Augmentation(Protocol):
    """Makes the random changes of one source's samples; safe across threads."""

    def view(self, drawn: Drawn) -> View:
        """How an image or video is shown; in its own colours at most if its sample's words cannot be used."""

    def tokens(self, drawn: Drawn) -> Mapping[int, Sequence[int]]:
        """Segment -> its tokens, of the rewritten texts of a sample. Raises SampleError for words that
        cannot be used."""


class NoAugmentation:
    """Everything as it is stored."""

    def view(self, drawn: Drawn) -> View:
        """See `Augmentation`."""
        return AS_IT_IS

    def tokens(self, drawn: Drawn) -> Mapping[int, Sequence[int]]:
        """See `Augmentation`."""
        return AS_IT_WAS.tokens


class RandomAugmentation:
    """What `data.augment` asks for."""

    def __init__(
        self,
        augment: AugmentConfig,
        read_words: Callable[[SampleRecord], Sequence[Words]],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        """`read_words`: a sample's words by segment, none for a format that declares nothing."""
        self._augment = augment
        self._read_words = read_words
        self._encode = encode
        self._changed = ByteCache[Changed](
            KEPT_BYTES, lambda each: 500 + 36 * sum(map(len, each.tokens.values()))
        )

    def view(self, drawn: Drawn) -> View:
        """See `Augmentation`."""
        if drawn.key == AS_STORED.key:
            return AS_IT_IS
        try:
            return self._of(drawn).views[drawn.number]
        except SampleError:
            # Counted where its words are read; nothing is learned of it.
            return colours(self._augment, drawn.key, drawn.number)

    def tokens(self, drawn: Drawn) -> Mapping[int, Sequence[int]]:
        """See `Augmentation`."""
        return AS_IT_WAS.tokens if drawn.key == AS_STORED.key else self._of(drawn).tokens

    def _of(self, drawn: Drawn) -> Changed:
        return self._changed.get(drawn.key, lambda: self._change(drawn.record, drawn.key))

    def _change(self, record: SampleRecord, key: int) -> Changed:
        # 1. Colours change no word.
        augment = self._augment
        own_colours = tuple(colours(augment, key, number) for number in range(len(record.media)))
        as_drawn = Changed(own_colours, {})
        if not (augment.crop or augment.flip):
            return as_drawn
        words = self._read_words(record)
        if not _is_declared(words, record):
            return as_drawn

        # 2. A crop that leaves all that is spoken of, and a mirror.
        flip = is_mirrored(augment, key)
        places = corners(words, record.media)
        views = tuple(
            replace(view, flip=flip, box=self._box(key, number, segment, places[number]))
            for number, (view, segment) in enumerate(zip(own_colours, record.media, strict=True))
        )

        # 3. The texts of it. Planning counts on their lengths: where one has another, nothing is moved.
        tokens: dict[int, Sequence[int]] = {}
        for number, (each, segment) in enumerate(zip(words, record.segments, strict=True)):
            text = rewritten(each, views, record.media)
            if text != each.text and isinstance(segment, TextSegment):
                tokens[number] = self._encode(text)
                if len(tokens[number]) != segment.num_tokens:
                    return as_drawn
        return Changed(views, tokens)

    def _box(
        self, key: int, number: int, segment: MediaSegment, places: Sequence[tuple[float, float]]
    ) -> tuple[float, float, float, float]:
        sides = []
        for side, (name, size) in enumerate((("width", segment.width), ("height", segment.height))):
            first, end = crop(self._augment, key, number, size, name)
            of_side = [place[side] * size for place in places]
            first = min(first, *map(math.floor, of_side)) if of_side else first
            end = max(end, *map(math.ceil, of_side)) if of_side else end
            sides.append((first / size, end / size))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom


def build_augmentation(
    augment: AugmentConfig,
    read_words: Callable[[SampleRecord], Sequence[Words]],
    encode: Callable[[str], Sequence[int]],
) -> Augmentation:
    """That of a source; see `RandomAugmentation`."""
    if augment.is_off:
        return NoAugmentation()
    return RandomAugmentation(augment, read_words, encode)


def _is_declared(words: Sequence[Words], record: SampleRecord) -> bool:
    """Whether every text that has words says what a changed picture has to carry along."""
    return len(words) == len(record.segments) and all(
        each.declared.is_declared or not each.text.strip() for each in words
    )
