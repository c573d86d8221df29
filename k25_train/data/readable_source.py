"""What micro-batches are read from: sources of `data.sources`, and trajectories of a policy."""

from typing import Protocol

import numpy as np

from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.media import MediaReader
from k25_train.data.formats.reader import Files
from k25_train.data.formats.records import SampleRecord
from k25_train.data.mix.documents import DocumentTokens


class Documents(Protocol):
    """Lays out the documents of one source, and reads their tokens; see `DocumentBuilder`."""

    def tokens(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int = 0, stop: int | None = None
    ) -> DocumentTokens:
        """Tokens `start` to `stop` of a document, all by default."""

    def num_targets(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int, stop: int
    ) -> int:
        """How many of the tokens `start` to `stop` count in the loss, without reading words."""

    def placeholders(self, record: SampleRecord, media: tuple[PlannedMedia, ...]) -> np.ndarray:
        """[V] int64: where a document has the placeholders of vision tokens."""


class ReadableSource(Protocol):
    """A source once it is open; `OpenSource` is one."""

    @property
    def name(self) -> str:
        """By which plans call it."""

    @property
    def documents(self) -> Documents:
        """Its documents."""

    @property
    def media_reader(self) -> MediaReader:
        """Reads and decodes its images and videos."""

    @property
    def reader(self) -> Files:
        """Reads its files."""

    def where(self, record: SampleRecord) -> str:
        """Where a sample is, as messages say it."""
