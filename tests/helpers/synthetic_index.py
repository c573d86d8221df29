"""An index as large as that of a real step, without files: for what planning costs, and what it disturbs.

`synthetic_data()` has the loader find it. Records, packing and plans are real; words and patches are made up
when they are read.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from k25_train.data import open_sources
from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.media import MediaPatches, MediaReader
from k25_train.data.folder import DataFolder
from k25_train.data.formats.dataset import Dataset, Manifest
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.mix.documents import DocumentBuilder, DocumentTokens
from tests.helpers.smoke_mix import mix

NUM_TEXTS, NUM_CAPTIONS = 125_000, 36_000
"""Samples of an epoch: those of about two steps."""
TEXT_TOKENS, IMAGE_SIDE_PIXELS, CAPTION_TOKENS = (200, 1680), (400, 1000), (20, 400)
"""Least and most of each, evenly distributed."""
BLEND = mix(text=0.8, caption=0.2)
"""With it a step of 16,384 sequences of 4,096 tokens has some 74,000 documents and 16,800 images."""


class SyntheticTokenizer:
    """Knows the ids that structure documents."""

    vocab_size, bos, eos, pad = 163_840, 1, 2, 3
    media_begin, media_content, media_pad, media_end = 4, 5, 6, 7
    sha256 = "0" * 64

    def encode(self, text: str) -> list[int]:
        """One token."""
        return [8]


@contextlib.contextmanager
def synthetic_data() -> Iterator[None]:
    """Within it, and in processes forked from it, loaders open the synthetic index."""
    dataset = _dataset()
    manifest = Manifest(DataFolder("synthetic"), {}, (), dataset.tokenizer_path)
    with (
        mock.patch.object(open_sources, "load_dataset", lambda *_: dataset),
        mock.patch.object(open_sources, "load_manifest", lambda *_: manifest),
        mock.patch.object(open_sources, "check_small", lambda *_: None),
        mock.patch.object(open_sources, "load_tokenizer", lambda _: SyntheticTokenizer()),
        mock.patch.object(DocumentBuilder, "tokens", _tokens),
        mock.patch.object(MediaReader, "load", _patches),
    ):
        yield


def _dataset() -> Dataset:
    draw = np.random.Generator(np.random.PCG64(0))
    texts = draw.integers(*TEXT_TOKENS, NUM_TEXTS).tolist()
    captions = draw.integers(*CAPTION_TOKENS, NUM_CAPTIONS).tolist()
    sizes = draw.integers(*IMAGE_SIDE_PIXELS, (NUM_CAPTIONS, 2)).tolist()
    records = [_record(number, "text", count) for number, count in enumerate(texts)]
    records += [
        _record(number, "caption", count, *size)
        for number, (count, size) in enumerate(zip(captions, sizes, strict=True))
    ]
    reader = mock.Mock(directory="synthetic")
    return Dataset(
        directory="synthetic",
        tokenizer_path="tokenizer.json",
        tokenizer_sha256=SyntheticTokenizer.sha256,
        splits={"train": tuple(records), "heldout": tuple(records[-10:])},
        sources=(),
        reader=reader,
    )


def _record(number: int, kind: str, num_tokens: int, *size: int) -> SampleRecord:
    words = TextSegment(num_tokens=num_tokens, loss=True)
    media = [
        MediaSegment(
            type="image", shard="train-00000.tar", offset=number, num_bytes=1, format="png", width=width,
            height=height, num_frames=1, duration_s=0.0, frame_times="",
        )
        for width, height in [size] * bool(size)
    ]  # fmt: skip
    return SampleRecord(
        shard="train-00000.tar", key=f"{kind}-{number}", kind=kind, source="synthetic",
        offset=number, num_bytes=1,
        segments=(*media, words),
    )  # fmt: skip


def _tokens(
    builder: DocumentBuilder, record: SampleRecord, media: Any, start: int = 0, stop: int | None = None
) -> DocumentTokens:
    assert stop is not None
    tokens = np.full(stop - start, 9, dtype=np.int64)
    for each in media:
        tokens[4 : 4 + each.items[0].num_tokens] = SyntheticTokenizer.media_pad
    return DocumentTokens(tokens, tokens != SyntheticTokenizer.media_pad, None)


def _patches(
    reader: MediaReader, media: PlannedMedia, positions: Collection[int] | None = None
) -> MediaPatches:
    chosen = range(len(media.items)) if positions is None else sorted(positions)
    width = 3 * reader._vision.patch_size**2
    return MediaPatches({each: torch.zeros(media.items[each].num_patches, width) for each in chosen}, None)
