"""The endless stream of packed sequences of one kind, addressed by number."""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from k25_train.config.data import SAMPLE_KINDS
from k25_train.config.model import VisionConfig
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.mix.documents import DocumentBuilder, find_defect
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

        Raises DataError if no usable one remains.
        """
        # 1. Usable samples and the lengths of their documents.
        self.kind = kind
        self._documents = documents
        self._seq_len = seq_len
        self._seed = seed
        self._shuffle = shuffle
        self._records: list[SampleRecord] = []
        self._lengths: list[int] = []
        for record in records:
            defect = find_defect(record, vision)
            length = 0 if defect else documents.num_tokens(record)
            if defect is None and kind != "text" and length > seq_len:
                defect = f"it has {length} tokens and is not cut, train.seq_len is {seq_len}"
            if defect is not None:
                skip_log.add(record, defect)
                continue
            self._records.append(record)
            self._lengths.append(length)
        if not self._records:
            raise DataError(
                f"data.blend gives a share to {kind!r}, but {documents.directory} has no usable sample of it "
                f"({len(records)} in this split). Take it out of the blend or build the set with that kind."
            )

        # 2. Number of sequences up to the end of each epoch packed so far. Several threads plan batches.
        self._ends: list[int] = []
        self._lock = threading.Lock()
        self._pack = lru_cache(maxsize=2)(self._pack_epoch)

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
