"""What a run's batches depend on outside its configuration, as text that a checkpoint keeps.

A resumed run compares these facts, key by key, with those of the checkpoint: equal facts and an equal
configuration give equal batches. They say nothing of where the shard set is, nor of how its samples are cut
into shards, so it may be copied, moved, or written again in shards of another size.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from operator import attrgetter
from typing import Any

from k25_train.data.formats.records import MediaSegment, SampleRecord, Segment, TextSegment

BATCH_VERSION = 3
"""Raised whenever the same shard set, configuration and step give another batch than before: another order,
packing, blend, document layout, or choice of frames and patches. A test keeps the batches of a tiny set."""

_NOT_SIZES = frozenset({"shard", "offset", "crc32"})
"""Where a file is, and its checksum, which is compared apart."""


def common_facts(tokenizer_sha256: str) -> dict[str, str]:
    """Dotted key -> what is true of all sources, in words that show a difference.

    `tokenizer_sha256`: of the vocabulary file.
    """
    return {"data.tokenizer": f"sha256 {tokenizer_sha256}", "data.packing": f"version {BATCH_VERSION}"}


def record_facts(name: str, records: Sequence[SampleRecord]) -> dict[str, str]:
    """What is true of samples in memory: `name` is the dotted key, `data.train.NAME` or `data.heldout.NAME`.

    `data.heldout.*` decides no step, but which loss the evaluations report.
    """
    # A set indexed without checksums is not known to be another one than its copy indexed with them.
    content = {f"{name}.content": _content(records)} if _has_checksums(records) else {}
    return {name: describe(records), **content}


def describe(records: Sequence[SampleRecord]) -> str:
    """Number of samples and of their text tokens, and a hash of all that decides their order and sizes.

    Takes about 7 s per million samples, half of what reading their index takes.
    """
    num_tokens = sum(record.num_text_tokens for record in records)
    sizes = ([record.key, record.kind, [_segment(each) for each in record.segments]] for record in records)
    return f"{len(records)} samples, {num_tokens} text tokens, {_hash(sizes)}"


def _content(records: Sequence[SampleRecord]) -> str:
    """A hash of the checksums of all files, those of media and of words."""
    return _hash([record.crc32, *(media.crc32 for media in record.media)] for record in records)


def _has_checksums(records: Sequence[SampleRecord]) -> bool:
    return all(record.crc32 and all(media.crc32 for media in record.media) for record in records)


def _hash(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return f"sha256 {digest.hexdigest()[:32]}"


def _segment(segment: Segment) -> list[Any]:
    return list(_OF_TEXT(segment)) if isinstance(segment, TextSegment) else _with_options(segment)


def _with_options(segment: MediaSegment) -> list[Any]:
    """Fields without a default, then those that differ from theirs: one added later, whose default is what
    sets without it mean, leaves the hash of such a set as it was."""
    options = [[name, value] for name, default in _OPTIONS if (value := getattr(segment, name)) != default]
    return [*_OF_MEDIA(segment), *options]


def _is_optional(field: Field[Any]) -> bool:
    # The default of the format's version is always the newest.
    return field.default is not MISSING and field.name != "format_version"


def _fields(segment_type: type[Segment]) -> list[Field[Any]]:
    return [field for field in fields(segment_type) if field.name not in _NOT_SIZES]


def _required(segment_type: type[Segment]) -> tuple[str, ...]:
    return tuple(field.name for field in _fields(segment_type) if not _is_optional(field))


_OF_TEXT = attrgetter(*_required(TextSegment))
_OF_MEDIA = attrgetter(*_required(MediaSegment))
_OPTIONS = tuple((field.name, field.default) for field in _fields(MediaSegment) if _is_optional(field))
