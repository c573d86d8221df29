"""What a run's batches depend on outside its configuration, as text that a checkpoint keeps.

A resumed run compares these facts, key by key, with those of the checkpoint: equal facts and an equal
configuration give equal batches. They say nothing of where the shard set is, nor of how its samples are cut
into shards, so it may be copied, moved, or written again in shards of another size.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from operator import attrgetter
from typing import Any

from k25_train.data.formats.records import MediaSegment, SampleRecord, Segment, TextSegment

BATCH_VERSION = 1
"""Raised whenever the same shard set, configuration and step give another batch than before: another order,
packing, blend, document layout, or choice of frames and patches. A test keeps the batches of a tiny set."""

_NOT_CONTENT = frozenset({"shard", "offset"})
"""Where a file is, not what it is."""


def data_facts(
    train: Mapping[str, Sequence[SampleRecord]],
    heldout: Mapping[str, Sequence[SampleRecord]],
    tokenizer_sha256: str,
) -> dict[str, str]:
    """Dotted key -> what is true of the data, in words that show a difference.

    `data.heldout.*` decides no step, but which loss the evaluations report.

    Args:
        train: kind of the blend -> its samples in the order of the shards, as many as are used.
        heldout: the same of the split that evaluations read.
        tokenizer_sha256: of the vocabulary file.
    """
    return {
        **{f"data.train.{kind}": describe(records) for kind, records in train.items()},
        **{f"data.heldout.{kind}": describe(records) for kind, records in heldout.items()},
        "data.tokenizer": f"sha256 {tokenizer_sha256}",
        "data.packing": f"version {BATCH_VERSION}",
    }


def describe(records: Sequence[SampleRecord]) -> str:
    """Number of samples and of their text tokens, and a hash of all that decides their order and sizes.

    Takes about 7 s per million samples, a third of what reading their index takes.
    """
    num_tokens = sum(record.num_text_tokens for record in records)
    return f"{len(records)} samples, {num_tokens} text tokens, sha256 {_hash(records)[:32]}"


def _hash(records: Iterable[SampleRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        content = [record.key, record.kind, [_segment(segment) for segment in record.segments]]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def _segment(segment: Segment) -> list[Any]:
    return list(_OF_TEXT(segment)) if isinstance(segment, TextSegment) else _with_options(segment)


def _with_options(segment: MediaSegment) -> list[Any]:
    """Fields without a default, then those that differ from theirs: one added later, whose default is what
    sets without it mean, leaves the hash of such a set as it was."""
    options = [[name, value] for name, default in _OPTIONS if (value := getattr(segment, name)) != default]
    return [*_OF_MEDIA(segment), *options]


def _required(segment_type: type[Segment]) -> tuple[str, ...]:
    return tuple(
        field.name
        for field in fields(segment_type)
        if field.name not in _NOT_CONTENT and field.default is MISSING
    )


_OF_TEXT = attrgetter(*_required(TextSegment))
_OF_MEDIA = attrgetter(*_required(MediaSegment))
_OPTIONS = tuple(
    (field.name, field.default) for field in fields(MediaSegment) if field.default is not MISSING
)
