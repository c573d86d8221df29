"""Held-out samples with the images and videos of others: shows whether a model uses what it sees."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.mix.windows import Selection
from k25_train.data.source_items import RecordItems
from k25_train.data.sources import OpenSource


def with_shuffled_media(source: OpenSource, limit: int | None, seed: int) -> OpenSource:
    """The source with the images and videos of what it holds out exchanged; see `shuffle_media`."""
    if limit is not None:
        positions = source.selection.training(np.arange(source.num_training(limit)))
        items = source.training
    elif source.heldout is source.training:
        items, positions = source.heldout, source.selection.heldout(np.arange(source.selection.num_heldout))
    else:
        items, positions = source.heldout, np.arange(source.heldout.columns.num_items)
    records = shuffle_media([items.record(position) for position in positions.tolist()], seed)
    shuffled = RecordItems(records)
    return replace(
        source, training=shuffled, heldout=RecordItems(records), selection=Selection(len(records), 0)
    )


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
