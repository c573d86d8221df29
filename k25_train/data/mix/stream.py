"""The endless stream of packed sequences of one kind, addressed by number."""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from k25_train.config.model import VisionConfig
from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.mix.documents import DocumentBuilder, find_defect, has_target
from k25_train.data.mix.packing import PackedEpoch, epoch_order, pack_cut, pack_whole
from k25_train.data.mix.plan import PlannedPiece, SequencePlan
from k25_train.data.skip_log import SkipLog
from k25_train.errors import DataError


class KindStream:
    """Epoch after epoch over the samples of one kind, each packed again in its own order.

    Documents are shuffled before packing and sequences after it: a long document fills many sequences in a
    row, which would make up a whole batch otherwise.

    Sequence k depends on (records, seq_len, seed, shuffle, k) alone. Epochs may differ in their number of
    sequences, so the first look-up packs every epoch before the one asked for; later ones are cached.
    """

    def __init__(
        self,
        kind: str,
        records: Sequence[SampleRecord],
        *,
        documents: DocumentBuilder,
        vision: VisionConfig,
        seq_len: int,
        seed: int,
        shuffle: bool,
        skip_log: SkipLog,
    ) -> None:
        """`records`: the samples of this kind. Those that the index shows to be unusable go to `skip_log`.

        Raises DataError if no usable one remains, or none that has a loss.
        """
        # 1. Usable samples and the lengths of their documents.
        self.kind = kind
        self._documents = documents
        self._seq_len = seq_len
        self._seed = seed
        self._shuffle = shuffle
        self._records, self._lengths = self._usable(records, vision, skip_log)

        # 2. Number of sequences up to the end of each epoch packed so far. Several threads plan batches.
        self._ends: list[int] = []
        self._lock = threading.Lock()
        self._pack = lru_cache(maxsize=2)(self._pack_epoch)

    def _usable(
        self, records: Sequence[SampleRecord], vision: VisionConfig, skip_log: SkipLog
    ) -> tuple[list[SampleRecord], list[int]]:
        """The samples that can be used, and the lengths of their documents."""
        usable: list[tuple[SampleRecord, int]] = []
        too_long: list[tuple[SampleRecord, int]] = []
        for record in records:
            defect = find_defect(record, vision)
            if defect is not None:
                skip_log.add(record, defect)
                continue
            length = self._documents.num_tokens(record)
            fits = self.kind == "text" or length <= self._seq_len
            (usable if fits else too_long).append((record, length))
        self._skip_too_long(too_long, bool(usable), skip_log)
        if not usable:
            raise DataError(
                f"data.sources.{self.kind}: {self._documents.directory} has no usable "
                f"sample of it ({len(records)} in this split). Leave it out (~data.sources."
                f"{self.kind}), use more samples (data.limit_samples), or build the set with that kind."
            )
        if not any(has_target(record) for record, _ in usable):
            raise DataError(
                f"data.sources.{self.kind}: no text of its {len(usable)} samples in "
                f"{self._documents.directory} has a loss: there is nothing to learn from them. Write the set "
                "with `loss: true` where words are to be learned, or leave it out (~data.sources."
                f"{self.kind})."
            )
        return [record for record, _ in usable], [length for _, length in usable]

    def _skip_too_long(
        self, too_long: Sequence[tuple[SampleRecord, int]], has_others: bool, skip_log: SkipLog
    ) -> None:
        """Skip samples that are longer than a sequence and not cut. Raises DataError if they are too many."""
        if not too_long:
            return
        # At least one sample has to remain.
        most = len(too_long) if has_others else len(too_long) - 1
        room = min(most, skip_log.room_for(record for record, _ in too_long))
        if len(too_long) > room:
            lengths = sorted((length for _, length in too_long), reverse=True)
            listing = "\n".join(
                f"  {skip_log.name(record)}: {self._too_long(length)}" for record, length in too_long[:5]
            )
            rest = len(too_long) - 5
            raise DataError(
                f"{len(too_long)} {self.kind} samples are longer than train.seq_len={self._seq_len}:\n"
                + listing
                + (f"\n  and {rest} more" if rest > 0 else "")
                + f"\nRaise train.seq_len: {lengths[room]} is the smallest that leaves {room} of them out, "
                f"{lengths[0]} holds all. Or leave more of them out with data.max_skipped_samples."
            )
        for record, length in too_long:
            skip_log.add(record, self._too_long(length))

    def _too_long(self, length: int) -> str:
        return f"it has {length} tokens and is not cut, train.seq_len is {self._seq_len}"

    def sequence(self, number: int) -> SequencePlan:
        """The `number`-th sequence (from 0) of the stream."""
        # 1. The epoch that holds this sequence; epochs before it are packed for their number of sequences.
        with self._lock:
            while not self._ends or self._ends[-1] <= number:
                packed = self._pack(len(self._ends))
                self._ends.append((self._ends[-1] if self._ends else 0) + len(packed.sequences))
            epoch = bisect_right(self._ends, number)
            pieces = self._pack(epoch).sequences[number - (self._ends[epoch - 1] if epoch else 0)]

        # 2. Its pieces, with what the tower sees of their media.
        planned = []
        for piece in pieces:
            record = self._records[piece.document]
            media = self._documents.media(record)
            planned.append(PlannedPiece(record=record, start=piece.start, length=piece.length, media=media))
        return SequencePlan(kind=self.kind, pieces=tuple(planned))

    def _pack_epoch(self, epoch: int) -> PackedEpoch:
        pack = pack_cut if self.kind == "text" else pack_whole
        packed = pack(self._lengths, self._order(len(self._records), epoch, "documents"), self._seq_len)
        order = self._order(len(packed.sequences), epoch, "sequences")
        return replace(packed, sequences=tuple(packed.sequences[i] for i in order))

    def _order(self, count: int, epoch: int, of: str) -> list[int]:
        # Each kind has one random stream for its documents and one for its sequences.
        stream = SAMPLE_KINDS.index(self.kind) + (0 if of == "documents" else len(SAMPLE_KINDS))
        return epoch_order(count, self._seed, epoch, stream, self._shuffle)


def shuffle_media(records: Sequence[SampleRecord], seed: int) -> list[SampleRecord]:
    """The samples with every image and video replaced by another's, with the words unchanged.

    One cycle through all media in an order drawn from `seed`, so none keeps its own if there are two or more.
    Shows whether a model uses what it sees: its caption loss on these must be higher.
    """
    positions = [
        (i, j)
        for i, record in enumerate(records)
        for j, segment in enumerate(record.segments)
        if isinstance(segment, MediaSegment)
    ]
    cycle = [positions[i] for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(positions))]
    segments = [list(record.segments) for record in records]
    for (i, j), (other, position) in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        segments[i][j] = records[other].segments[position]
    return [replace(record, segments=tuple(new)) for record, new in zip(records, segments, strict=True)]
