"""A packed sequence as a page shows it: its documents, their tokens with the loss mask, their media.

All of it is what training computes on: tokens and mask of the micro-batch, pixels after resizing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.data.batch import MicroBatch
from k25_train.data.mix.plan import SequencePlan
from k25_train.data.tokenizer import Tokenizer

OPENINGS = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>")
"""Chat tokens with which a turn begins."""
LONGEST_CHARACTER_TOKENS = 4
"""Byte tokens that a character of UTF-8 may take."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token, or the few that make a character, or a run of placeholders."""

    text: str
    ids: tuple[int, ...]
    is_target: bool
    """Whether predicting it counts in the loss."""
    is_special: bool
    """Whether it structures the document."""
    opens_turn: bool = False
    """Whether a turn of a conversation begins with it."""


@dataclass(frozen=True, slots=True, eq=False)
class ShownImage:
    """What the tower sees of an image, or of the first frame of a video chunk."""

    pixels: np.ndarray
    """[H, W, 3] uint8, padding included."""
    num_frames: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document, or the stretch of it that lies in the sequence."""

    name: str
    """Where its sample is."""
    start: int
    """Its first token, counted in the document."""
    length: int
    num_targets: int
    is_usable: bool
    tokens: tuple[ShownToken, ...]
    images: tuple[ShownImage, ...]
    """In the order of their runs of placeholders."""


@dataclass(frozen=True, slots=True)
class ShownSequence:
    """One row of a batch."""

    source: str
    documents: tuple[ShownDocument, ...]
    padding: int
    """Tokens of padding at its end."""


def show(
    plan: SequencePlan, batch: MicroBatch, tokenizer: Tokenizer, vision: VisionConfig, source: str
) -> ShownSequence:
    """A sequence from its plan and from the micro-batch of it alone, read with pixels."""
    ends = list(accumulate(batch.document_lengths))
    images = _images(batch, vision)
    documents = []
    for number, piece in enumerate(plan.pieces):
        first, last = ends[number] - batch.document_lengths[number], ends[number]
        ids = batch.tokens[first:last].tolist()
        # A mask says of each position whether the token behind it is a target.
        is_target = [False, *(batch.loss_mask[first : last - 1] > 0).tolist()]
        own = [image for image, of in zip(images, batch.item_documents, strict=True) if of == number]
        documents.append(
            ShownDocument(
                name=f"{piece.record.shard}, sample {piece.record.key}",
                start=piece.start,
                length=piece.length,
                num_targets=sum(is_target),
                is_usable=number not in batch.unreadable,
                tokens=tuple(_tokens(ids, is_target, tokenizer)),
                images=tuple(own),
            )
        )
    used = sum(batch.document_lengths[: len(plan.pieces)])
    return ShownSequence(source, tuple(documents), len(batch.tokens) - used)


def _tokens(ids: Sequence[int], is_target: Sequence[bool], tokenizer: Tokenizer) -> Iterator[ShownToken]:
    """Tokens in order; placeholders of one image are one, and so are those of one character."""
    special = {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.media_begin, tokenizer.media_content}
    special |= {tokenizer.media_end, tokenizer.media_pad, *tokenizer.chat_ids.values()}
    openings = {tokenizer.chat_ids[name] for name in OPENINGS if name in tokenizer.chat_ids}
    position = 0
    while position < len(ids):
        end = position + 1
        if ids[position] == tokenizer.media_pad:
            while end < len(ids) and ids[end] == tokenizer.media_pad:
                end += 1
            text = f"{tokenizer.decode([tokenizer.media_pad])} × {end - position}"
        else:
            text = tokenizer.decode(ids[position:end])
            while "\ufffd" in text and end < min(position + LONGEST_CHARACTER_TOKENS, len(ids)):
                longer = tokenizer.decode(ids[position : end + 1])
                end += 1
                text = longer
        first = ids[position]
        own = tuple(ids[position:end])
        yield ShownToken(text, own, is_target[position], first in special, first in openings)
        position = end


def _images(batch: MicroBatch, vision: VisionConfig) -> list[ShownImage]:
    """The items of a micro-batch, put together again from their patches."""
    if batch.pixels is None:
        return []
    patch = vision.patch_size
    shown = []
    position = 0
    for grid in batch.grid_thw:
        frames, rows, columns = grid
        own = batch.pixels[position : position + rows * columns]
        position += frames * rows * columns
        image = own.reshape(rows, columns, 3, patch, patch).permute(0, 3, 1, 4, 2)
        pixels = image.reshape(rows * patch, columns * patch, 3).numpy()
        shown.append(ShownImage(pixels, frames, grid.num_tokens))
    return shown
