"""Micro-batches: planned sequences (`mix/plan.py`), assembled as tensors.

Shapes: T = micro_batch_size * seq_len tokens, rows one after another; P patches of all items.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from k25_train.config.model import VisionConfig
from k25_train.data.decode.media import MediaReader
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.mix.plan import SequencePlan, media_of
from k25_train.data.skip_log import SkipLog
from parallel.dep.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The sequences that a rank computes at once."""

    tokens: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64, the next token of the document; 0 where `loss_mask` is 0."""
    loss_mask: Tensor
    """[T] float32, 0 or 1; 0 where the next token is padding, of media, of text without loss, or absent."""
    is_caption: Tensor
    """[T] bool, True in documents with media, whose loss evaluations report separately."""
    document_lengths: tuple[int, ...]
    """Lengths that sum to T. Padding at a row's end is in the place of a document; none crosses rows."""
    padding: tuple[int, ...]
    """Positions in `document_lengths` of what is padding, samples included whose words cannot be used."""
    grid_thw: tuple[Grid, ...]
    """Patch grid of each item in placeholder order."""
    item_documents: tuple[int, ...]
    """For each item, the position of its document in `document_lengths`."""
    pixels: Tensor | None
    """[P, 3*p*p] float32, patches of all items; None if not requested."""
    failed_items: tuple[int, ...]
    """Items whose file did not decode; their pixels are 0. Known only if pixels were requested."""


def mask_failed(batch: MicroBatch, failed_items: Sequence[int]) -> MicroBatch:
    """The batch without the loss of the documents that hold `failed_items` (positions in `grid_thw`).

    Already done where the pixels were decoded; other pipeline stages of the same replica learn of the items
    and do it, too. Doing it twice changes nothing.
    """
    if not failed_items:
        return batch
    ends = list(accumulate(batch.document_lengths))
    loss_mask, labels = batch.loss_mask.clone(), batch.labels.clone()
    for document in {batch.item_documents[item] for item in failed_items}:
        span = slice(ends[document] - batch.document_lengths[document], ends[document])
        loss_mask[span] = 0
        labels[span] = 0
    return replace(batch, loss_mask=loss_mask, labels=labels, failed_items=tuple(failed_items))


class MicroBatchAssembler:
    """Reads, tokenises and decodes planned sequences into tensors."""

    def __init__(
        self,
        *,
        media: MediaReader,
        documents: DocumentBuilder,
        vision: VisionConfig,
        seq_len: int,
        pad_token: int,
        skip_log: SkipLog,
    ) -> None:
        """`skip_log` counts samples whose words or media cannot be used, and may stop the run."""
        self._documents = documents
        self._vision = vision
        self._seq_len = seq_len
        self._pad_token = pad_token
        self._skip_log = skip_log
        self._media = media

    def assemble(self, sequences: Sequence[SequencePlan], with_pixels: bool) -> MicroBatch:
        """One micro-batch of the given sequences.

        A sample whose words or media cannot be used keeps its place: padding for words, 0 for pixels, and no
        loss. Raises DataError when those pass the limit, or when a shard cannot be read.
        """
        # 1. Rows of padding without loss.
        num_tokens = len(sequences) * self._seq_len
        tokens = np.full(num_tokens, self._pad_token, dtype=np.int64)
        labels = np.zeros(num_tokens, dtype=np.int64)
        loss_mask = np.zeros(num_tokens, dtype=np.float32)
        is_caption = np.zeros(num_tokens, dtype=np.bool_)

        # 2. Pieces one after another. Each position's label is the next token of its own piece: across a cut,
        #    and across documents, nothing is predicted.
        lengths: list[int] = []
        paddings: list[int] = []
        item_documents: list[int] = []
        for row, sequence in enumerate(sequences):
            position = row * self._seq_len
            for piece in sequence.pieces:
                span = slice(position, position + piece.length)
                stop = piece.start + piece.length
                document = self._documents.tokens(piece.record, piece.media, piece.start, stop)
                if document.failure is not None:
                    self._skip_log.add(piece.record, document.failure)
                    paddings.append(len(lengths))
                tokens[span] = document.tokens
                is_target = document.is_target[1:]
                targets = slice(position, position + piece.length - 1)
                labels[targets] = np.where(is_target, tokens[position + 1 : position + piece.length], 0)
                loss_mask[targets] = is_target
                is_caption[span] = piece.record.kind != "text"
                item_documents += [len(lengths)] * len(piece.items)
                lengths.append(piece.length)
                position += piece.length
            rest = (row + 1) * self._seq_len - position
            if rest:
                paddings.append(len(lengths))
                lengths.append(rest)

        # 3. Pixels, if this rank encodes them; documents whose media do not decode lose their loss.
        pixels, failed_items = self._load_pixels(sequences) if with_pixels else (None, ())
        batch = MicroBatch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(loss_mask),
            is_caption=torch.from_numpy(is_caption),
            document_lengths=tuple(lengths),
            padding=tuple(paddings),
            grid_thw=tuple(item.grid_thw for sequence in sequences for item in sequence.items),
            item_documents=tuple(item_documents),
            pixels=pixels,
            failed_items=failed_items,
        )
        return mask_failed(batch, failed_items)

    def _load_pixels(self, sequences: Sequence[SequencePlan]) -> tuple[Tensor, tuple[int, ...]]:
        """Patches [P, 3*p*p] of all items, and the items that did not decode."""
        patches = [torch.zeros(0, 3 * self._vision.patch_size**2)]
        failed_items: list[int] = []
        num_items = 0
        for record, media in media_of(sequences):
            found = self._media.load(media)
            if found.failure is not None:
                self._skip_log.add(record, found.failure)
                failed_items += range(num_items, num_items + len(found.items))
            patches += found.items.values()
            num_items += len(found.items)
        return torch.cat(patches), tuple(failed_items)
