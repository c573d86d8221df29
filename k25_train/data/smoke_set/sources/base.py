"""What every source is made of: pinned archives, and samples that are not tokenized yet."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from k25_train.data.smoke_set.sources.archive import Archive, ArchiveReader

MAX_KEY_LENGTH = 72

Archives = Mapping[str, ArchiveReader]
"""Package name -> its opened archive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Words of a sample; all text of the smoke set is trained on."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """An image or a video as file content."""

    type: str
    """`image` or `video`."""
    data: bytes
    format: str
    """File extension without dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample before tokenization."""

    key: str
    """Unique in the set; letters, digits, `_` and `-`."""
    group: str
    """What the sample is about. Samples of one group are near-duplicates: all train, or all held out."""
    kind: str
    """`text`, `caption`, `ocr` or `video`."""
    source: str
    """Name of the `Source`."""
    parts: tuple[Text | Media, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source of samples."""

    name: str
    archives: tuple[Archive, ...]
    """The packages it reads; the first one is the source's version."""
    licence: str
    """SPDX expression of the content used, not of the package around it."""
    attribution: str
    """Who made it, in a sentence for LICENSES.md."""
    samples: Callable[[Archives], Iterator[Sample]]


def pick[T](key: str, choices: tuple[T, ...]) -> T:
    """One of `choices`, fixed by `key` alone, evenly spread over many keys."""
    digest = hashlib.sha256(key.encode()).digest()
    return choices[int.from_bytes(digest[:8]) % len(choices)]


def slug(text: str) -> str:
    """`text` as a sample key: every other character than letters and digits becomes `-`.

    A long one is cut and marked by its hash, since tar member names end at 100 bytes.
    """
    words = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text).split()).lower()
    if len(words) <= MAX_KEY_LENGTH:
        return words
    return f"{words[: MAX_KEY_LENGTH - 9]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
