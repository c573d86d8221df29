"""Micro-batches: planned sequences (`mix/plan.py`), assembled as tensors.

Shapes: T = micro_batch_size * seq_len tokens, rows one after another; V vision tokens; P patches.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.media import MediaPatches
from k25_train.data.mix.plan import PlannedPiece, SequencePlan, media_of
from k25_train.data.policy_rows import NO_POLICY, PolicyRows, PolicySource
from k25_train.data.readable_source import ReadableSource
from k25_train.data.reused_memory import ReusedMemory
from k25_train.data.skip_log import SkipLog
from parallel.dep.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What of its micro-batches a rank needs. What the index tells of documents all ranks have."""

    tokens: bool
    """For embedding them: in the first pipeline stage."""
    labels: bool
    """For the loss: in the last one."""
    pixels: bool
    """For a coupled tower."""

    @property
    def words(self) -> bool:
        """Whether samples have to be read and tokenized."""
        return self.tokens or self.labels


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The sequences that a rank computes at once. Tensors that were not asked for have no elements."""

    tokens: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64, the next token of the document; 0 where `loss_mask` is 0."""
    loss_mask: Tensor
    """[T] float32, 0 or 1; 0 where the next token is padding, of media, of text without loss, or absent."""
    source: Tensor
    """[T] int16, position of each token's source in `data.sources`: evaluations report losses by source."""
    policy: Tensor
    """[C, T] float32, what reinforcement learning knows of each label (`policy_rows.py`); [0, 0] if nothing.
    Where `loss_mask` is 0 it has no meaning."""
    responses: Tensor
    """[T] int32, number of the trajectory that each label is of; [0] if there are no such columns."""
    media_positions: Tensor
    """[V] int64, where the placeholders of vision tokens are; asked for with the tokens."""
    document_lengths: tuple[int, ...]
    """Lengths that sum to T. Padding at a row's end is in the place of a document; none crosses rows."""
    padding: tuple[int, ...]
    """Positions in `document_lengths` of what is padding, samples included whose words cannot be used."""
    num_targets: tuple[int, ...]
    """For each of `document_lengths`, how many of its tokens have a loss."""
    unreadable: tuple[int, ...]
    """Positions in `document_lengths` of samples whose words cannot be used; known where they are read."""
    grid_thw: tuple[Grid, ...]
    """Patch grid of each item in placeholder order."""
    item_documents: tuple[int, ...]
    """For each item, the position of its document in `document_lengths`."""
    pixels: Tensor | None
    """[P, 3*p*p] uint8, patches of all items; None if not requested."""
    failed_items: tuple[int, ...]
    """Items whose file did not decode; their pixels are 0. Known only if pixels were requested."""


def without_loss(batch: MicroBatch, documents: Collection[int]) -> MicroBatch:
    """The batch without the loss of `documents` (positions in `document_lengths`); twice changes nothing."""
    ends = list(accumulate(batch.document_lengths))
    loss_mask, labels = batch.loss_mask.clone(), batch.labels.clone()
    for document in documents:
        span = slice(ends[document] - batch.document_lengths[document], ends[document])
        # Where labels are not read, both are empty.
        loss_mask[span] = 0
        labels[span] = 0
    counts = tuple(0 if number in documents else count for number, count in enumerate(batch.num_targets))
    return replace(batch, loss_mask=loss_mask, labels=labels, num_targets=counts)


def mask_failed(batch: MicroBatch, failed_items: Sequence[int]) -> MicroBatch:
    """The batch without the loss of the documents that hold `failed_items` (positions in `grid_thw`).

    Already done where the pixels were decoded; other pipeline stages of the same replica learn of the items
    and do it, too. Doing it twice changes nothing.
    """
    if not failed_items:
        return batch
    masked = without_loss(batch, {batch.item_documents[item] for item in failed_items})
    return replace(masked, failed_items=tuple(failed_items))


def mask_unreadable(batch: MicroBatch, documents: Collection[int]) -> MicroBatch:
    """The batch with `documents` as padding: those whose words another stage could not use."""
    if set(documents) <= set(batch.unreadable):
        return batch
    padding, unreadable = {*batch.padding, *documents}, {*batch.unreadable, *documents}
    masked = without_loss(batch, documents)
    return replace(masked, padding=tuple(sorted(padding)), unreadable=tuple(sorted(unreadable)))


@dataclass(slots=True)
class _Rows:
    """A micro-batch in the making: rows of padding without loss, filled piece by piece."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    source: np.ndarray
    policy: PolicyRows

    @classmethod
    def of(cls, num_tokens: int, pad_token: int, num_columns: int) -> "_Rows":
        return cls(
            np.full(num_tokens, pad_token, dtype=np.int64),
            np.zeros(num_tokens, dtype=np.int64),
            np.zeros(num_tokens, dtype=np.float32),
            np.zeros(num_tokens, dtype=np.int16),
            PolicyRows.of(num_columns, num_tokens),
        )

    def put(
        self, position: int, source: int, piece: PlannedPiece, tokens: np.ndarray, is_target: np.ndarray
    ) -> slice:
        """Each position's label is the next token of its own piece: across a cut, and across documents,
        nothing is predicted. Gives the positions that have labels."""
        span = slice(position, position + piece.length)
        targets = slice(position, position + piece.length - 1)
        self.tokens[span] = tokens
        self.labels[targets] = np.where(is_target[1:], self.tokens[position + 1 : position + piece.length], 0)
        self.loss_mask[targets] = is_target[1:]
        self.source[span] = source
        return targets


class MicroBatchAssembler:
    """Reads, tokenises and decodes planned sequences into tensors."""

    def __init__(
        self,
        *,
        vision: VisionConfig,
        seq_len: int,
        pad_token: int,
        media_pad: int,
        skip_log: SkipLog,
        sources: Mapping[str, ReadableSource],
        policy: PolicySource = NO_POLICY,
    ) -> None:
        """
        Args:
            media_pad: the placeholder of a vision token.
            skip_log: counts samples whose words or media cannot be used, and may stop the run.
            sources: by name, in the order of the numbers that tokens are marked with.
            policy: what reinforcement learning knows of labels.
        """
        self._policy = policy
        self._sources = sources
        self._memory = ReusedMemory()
        self._vision = vision
        self._seq_len = seq_len
        self._pad_token = pad_token
        self._media_pad = media_pad
        self._skip_log = skip_log
        self._source_numbers = {name: number for number, name in enumerate(sources)}

    def assemble(self, sequences: Sequence[SequencePlan], reads: Reads) -> MicroBatch:
        """One micro-batch of the given sequences, with what `reads` asks for but pixels (`with_pixels`).

        A sample whose words cannot be used keeps its place as padding without loss. Raises DataError when
        those pass the limit, or when a shard cannot be read.
        """
        # 1. Pieces one after another, in rows with padding at their ends.
        num_tokens = len(sequences) * self._seq_len if reads.words else 0
        rows = _Rows.of(num_tokens, self._pad_token, self._policy.num_columns)
        lengths: list[int] = []
        num_targets: list[int] = []
        paddings: list[int] = []
        unreadable: list[int] = []
        item_documents: list[int] = []
        for row, sequence in enumerate(sequences):
            position, number = row * self._seq_len, self._source_numbers[sequence.source]
            for piece in sequence.pieces:
                count, is_usable = self._read_piece(
                    piece, self._sources[sequence.source], number, position, rows, reads
                )
                if not is_usable:
                    unreadable.append(len(lengths))
                    paddings.append(len(lengths))
                item_documents += [len(lengths)] * len(piece.items)
                lengths.append(piece.length)
                num_targets.append(count)
                position += piece.length
            rest = (row + 1) * self._seq_len - position
            if rest:
                paddings.append(len(lengths))
                lengths.append(rest)
                num_targets.append(0)

        # 2. What was asked for.
        (tokens,) = _asked_for(reads.tokens, rows.tokens)
        labels, loss_mask, source, responses = _asked_for(
            reads.labels, rows.labels, rows.loss_mask, rows.source, rows.policy.responses
        )
        columns = torch.from_numpy(rows.policy.columns)
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            loss_mask=loss_mask,
            source=source,
            policy=columns if reads.labels else columns[:, :0],
            responses=responses,
            media_positions=torch.from_numpy(np.flatnonzero(tokens.numpy() == self._media_pad)),
            document_lengths=tuple(lengths),
            padding=tuple(paddings),
            num_targets=tuple(num_targets),
            unreadable=tuple(unreadable),
            grid_thw=tuple(item.grid_thw for sequence in sequences for item in sequence.items),
            item_documents=tuple(item_documents),
            pixels=None,
            failed_items=(),
        )

    def with_pixels(
        self,
        batch: MicroBatch,
        sequences: Sequence[SequencePlan],
        found: Iterator[MediaPatches],
        pixels: Tensor,
    ) -> MicroBatch:
        """A micro-batch with the patches of all its items; `found` gives them image by image, video by video
        (`media_of`). Documents whose media do not decode lose their loss. `pixels` [P, 3*p*p] is filled.

        Raises `DataError` when those pass the limit.
        """
        # Filled in place: what `found` gives may be memory that a worker waits for.
        failed_items: list[int] = []
        num_items, row = 0, 0
        for name, record, media in media_of(sequences):
            patches = next(found)
            if patches.failure is not None:
                self._skip_log.add_named(self._sources[name].where(record), patches.failure, log=True)
                failed_items += range(num_items, num_items + len(patches.items))
            for of_item in patches.items.values():
                pixels[row : row + len(of_item)] = of_item
                row += len(of_item)
            num_items += len(media.items)
        return mask_failed(replace(batch, pixels=pixels, failed_items=tuple(failed_items)), failed_items)

    def room_for(self, batches: Sequence[Sequence[SequencePlan]]) -> Sequence[Tensor]:
        """Memory [P, 3*p*p] uint8 for the patches of each micro-batch, one behind the other, so that
        stacking them copies nothing."""
        counts = [
            sum(item.num_patches for sequence in sequences for item in sequence.items)
            for sequences in batches
        ]
        room = self._memory.array(sum(counts), 3 * self._vision.patch_size**2)
        return torch.from_numpy(room).split(counts)

    def _read_piece(
        self,
        piece: PlannedPiece,
        source: ReadableSource,
        number: int,
        position: int,
        rows: _Rows,
        reads: Reads,
    ) -> tuple[int, bool]:
        """Fill in a piece if words are asked for; how many of its tokens have a loss, and whether its words
        can be used, which is not known unless they are read."""
        stop = piece.start + piece.length
        if not reads.words:
            return source.documents.num_targets(piece.record, piece.media, piece.start + 1, stop), True
        document = source.documents.tokens(piece.record, piece.media, piece.start, stop)
        if document.failure is not None:
            self._skip_log.add_named(source.where(piece.record), document.failure, log=True)
        labels = rows.put(position, number, piece, document.tokens, document.is_target)
        self._policy.fill(rows.policy, labels, source.name, piece)
        return int(document.is_target[1:].sum()), document.failure is None


def _asked_for(is_asked_for: bool, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """The arrays as tensors, without elements where nobody asked for them."""
    return tuple(torch.from_numpy(array if is_asked_for else array[:0]) for array in arrays)
