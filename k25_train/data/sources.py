"""The sources of `data.sources`, open: their items for planning, and what reads them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.data.augment.draws import Keys, as_stored
from k25_train.data.decode.items import AS_STORED, Drawn, PlannedMedia
from k25_train.data.decode.media import MediaReader
from k25_train.data.formats.reader import SourceReader
from k25_train.data.formats.records import SampleRecord
from k25_train.data.mix.documents import DocumentBuilder, find_defect
from k25_train.data.mix.lengths import DocumentLengths, Measured
from k25_train.data.mix.windows import Selection
from k25_train.data.skip_log import LISTED, SkipLog
from k25_train.data.source_items import Items
from k25_train.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenSource:
    """A source that passed its checks."""

    name: str
    """Its key in `data.sources`."""
    place: str
    """Where it is, for messages."""
    documents: DocumentBuilder
    """Lays out and tokenizes its documents."""
    media_reader: MediaReader
    """Reads and decodes its images and videos."""
    stays_whole: bool
    """Whether its documents are never cut: chats, and all that may have media."""
    num_frame_tokens: int
    """Tokens around a whole document."""
    training: Items
    """What is trained on."""
    heldout: Items
    """What evaluations read."""
    selection: Selection
    """Which of `training` are trained on; the others are held out, if it is the same index."""
    reader: SourceReader
    """Reads its files."""

    @property
    def has_media(self) -> bool:
        """Whether it has images or video to train on."""
        return self.training.columns.has_media

    def facts(self, of_training: str, of_heldout: str, limit: int | None) -> dict[str, str]:
        """What is true of what it trains on and of what it holds out, under these dotted keys."""
        return self.training.facts(of_training, limit) | self.heldout.facts(of_heldout, limit)

    def num_training(self, limit: int | None) -> int:
        """Items that are trained on."""
        return _least(self.selection.num_training, limit)

    def num_heldout(self, limit: int | None) -> int:
        """Items that evaluations read: with a `limit`, those trained on."""
        if limit is not None:
            return self.num_training(limit)
        is_same = self.heldout is self.training
        return self.selection.num_heldout if is_same else self.heldout.columns.num_items

    def where(self, record: SampleRecord) -> str:
        """Where a sample is, as messages say it."""
        return f"{self.place}/{record.shard}, sample {record.key}"


class SourceDocuments:
    """What is trained on, or held out, of one source: `stream.Documents` and `plan.PieceSource`."""

    def __init__(
        self,
        source: OpenSource,
        items: Items,
        *,
        chosen: Callable[[np.ndarray], np.ndarray],
        num_items: int,
        vision: VisionConfig,
        seq_len: int,
        skip_log: SkipLog,
        keys: Keys,
    ) -> None:
        """`chosen`: from positions [0, num_items) to items of the index. What cannot be used goes to
        `skip_log`. `keys`: what random changes depend on."""
        self.source = source
        self.name = source.name
        self.num_items = num_items
        self.is_cut = not source.stays_whole
        self.items = chosen
        self.record = items.record
        self._keys = keys
        self._vision = vision
        self._seq_len = seq_len
        self._skip_log = skip_log
        self._lengths = DocumentLengths(
            items.columns,
            items.record,
            vision,
            source.documents.num_item_tokens,
            num_frame_tokens=source.num_frame_tokens,
        )

    def media(self, record: SampleRecord, item: int, epoch: int) -> tuple[PlannedMedia, ...]:
        """See `plan.PieceSource`."""
        planned, key = self.source.documents.media(record), self._keys(item, epoch)
        if key == AS_STORED.key:
            return planned
        return tuple(
            replace(media, drawn=Drawn(key=key, number=number, record=record))
            for number, media in enumerate(planned)
        )

    def measure(self, items: np.ndarray, *, is_first: bool) -> Measured:
        """See `stream.Documents`. Raises DataError where too many cannot be used."""
        measured = self._lengths.measure(items)
        is_too_long = ~np.bool_(self.is_cut) & (measured.lengths > self._seq_len)
        lengths = np.where(is_too_long, 0, measured.lengths)
        if is_first:
            self._note_unusable(items, lengths, np.where(is_too_long, measured.lengths, 0))
        return replace(measured, lengths=lengths)

    def _note_unusable(self, items: np.ndarray, lengths: np.ndarray, too_long: np.ndarray) -> None:
        """Count, and name some of, what cannot be used of a window; `too_long`: lengths of those that are."""
        unusable = np.flatnonzero((lengths == 0) & (too_long == 0))
        window = self.name, int(items[0])
        named = dict(self._defect(int(item)) for item in items[unusable[:LISTED]])
        self._skip_log.add_window(window, named, len(unusable) - len(named))
        long = np.flatnonzero(too_long)
        if len(long):
            self._check_too_long(items[long], too_long[long], has_others=bool(lengths.any()))
            for item, length in zip(items[long[:LISTED]].tolist(), too_long[long].tolist(), strict=False):
                named[self.source.where(self.record(item))] = self._too_long(length)
            self._skip_log.add_window(window, named, len(unusable) + len(long) - len(named))

    def _defect(self, item: int) -> tuple[str, str]:
        record = self.record(item)
        return self.source.where(record), find_defect(record, self._vision) or "its document is empty"

    def nothing_usable(self) -> str:
        """See `stream.Documents`."""
        return (
            f"data.sources.{self.name}: {self.source.place} has no usable sample of it ({self.num_items} in "
            f"this split). Leave it out (~data.sources.{self.name}), use more samples (data.limit_samples), "
            "or build or index it again."
        )

    def _check_too_long(self, items: np.ndarray, lengths: np.ndarray, *, has_others: bool) -> None:
        """Raises DataError if more documents are longer than a sequence, and not cut, than may be skipped."""
        # At least one sample has to remain.
        room = min(len(items) if has_others else len(items) - 1, self._skip_log.room + self._num_known(items))
        if len(items) <= room:
            return
        descending = np.sort(lengths)[::-1].tolist()
        listing = "\n".join(
            f"  {self.source.where(self.record(item))}: {self._too_long(length)}"
            for item, length in zip(items[:5].tolist(), lengths[:5].tolist(), strict=True)
        )
        rest = len(items) - 5
        raise DataError(
            f"{len(items)} {self.name} samples are longer than train.seq_len={self._seq_len}:\n"
            + listing
            + (f"\n  and {rest} more" if rest > 0 else "")
            + f"\nRaise train.seq_len: {descending[room]} is the smallest that leaves {room} of them out, "
            f"{descending[0]} holds all. Or leave more of them out with data.max_skipped_samples."
        )

    def _num_known(self, items: np.ndarray) -> int:
        """How many of them are counted already."""
        return sum(self.source.where(self.record(item)) in self._skip_log.skipped for item in items.tolist())

    def _too_long(self, length: int) -> str:
        return f"it has {length} tokens and is not cut, train.seq_len is {self._seq_len}"


def training_documents(
    source: OpenSource,
    limit: int | None,
    vision: VisionConfig,
    seq_len: int,
    skip_log: SkipLog,
    keys: Keys = as_stored,
) -> SourceDocuments:
    """What is trained on of a source, at most the first `limit` items; `keys` change it at random."""
    chosen = source.selection.training
    num_items = source.num_training(limit)
    return _documents(source, source.training, chosen, num_items, vision, seq_len, skip_log, keys)


def heldout_documents(
    source: OpenSource, limit: int | None, vision: VisionConfig, seq_len: int, skip_log: SkipLog
) -> SourceDocuments:
    """What is held out of a source; with a `limit` what is trained on, which is then to be memorized."""
    if limit is not None:
        return training_documents(source, limit, vision, seq_len, skip_log)
    if source.heldout is source.training:
        selection = source.selection
        return _documents(
            source, source.heldout, selection.heldout, selection.num_heldout, vision, seq_len, skip_log
        )
    num_items = source.heldout.columns.num_items
    return _documents(
        source, source.heldout, lambda positions: positions, num_items, vision, seq_len, skip_log
    )


def _documents(
    source: OpenSource,
    items: Items,
    chosen: Callable[[np.ndarray], np.ndarray],
    num_items: int,
    vision: VisionConfig,
    seq_len: int,
    skip_log: SkipLog,
    keys: Keys = as_stored,
) -> SourceDocuments:
    return SourceDocuments(
        source,
        items,
        chosen=chosen,
        num_items=num_items,
        vision=vision,
        seq_len=seq_len,
        skip_log=skip_log,
        keys=keys,
    )


def _least(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)
