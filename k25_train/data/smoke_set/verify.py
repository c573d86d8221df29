"""Re-reads a shard set byte by byte and names every file that is not what it should be.

Loading checks only what a run needs before its first step; here every member is decoded and compared with the
index, and every file with its checksum.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from k25_train.data.decode.media_faults import media_faults
from k25_train.data.folder import DataFolder, MissingFileError
from k25_train.data.formats.dataset import MANIFEST
from k25_train.data.formats.index import parse_index
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError, Words, parse_sample, parse_words
from k25_train.data.smoke_set.build import TOKENIZER_FILE
from k25_train.data.smoke_set.provenance import CHECKSUMS_FILE
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError

Members = dict[str, tuple[int, bytes]]
"""Member name -> offset of its data in the shard, and the data."""


def verify_dataset(directory: str | Path, report: Callable[[str], None]) -> list[str]:
    """All faults of a shard set, local or at an fsspec URL, each a line that starts with the file; `report`
    gets one line per shard.

    Finds: a missing, changed or cut file, media that do not decode or differ in size from the index, a sample
    without the media or the text its kind needs, text that is none, token counts that are not the
    tokenizer's, samples that only the shard or only the index has, and names that lead out of the set.
    """
    try:
        folder = DataFolder(str(directory))
        manifest = json.loads(folder.read(folder.check_name(MANIFEST)))
        entries = [entry for split in manifest["splits"].values() for entry in split]
        names = [(folder.check_name(entry["shard"]), folder.check_name(entry["index"])) for entry in entries]
        tokenizer = load_tokenizer(folder.path(folder.check_name(manifest["tokenizer"])))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{directory}/{MANIFEST}: not readable as a manifest ({error!r})"]
    except DataError as error:
        return [str(error)]
    faults = list(_checksum_faults(folder))
    for shard, index in names:
        found = list(_shard_faults(folder, shard, index, tokenizer))
        report(f"{shard}: {len(found) or 'no'} fault{'s' * (len(found) != 1)}")
        faults += found
    return faults


def _checksum_faults(folder: DataFolder) -> Iterator[str]:
    try:
        lines = folder.read(folder.check_name(CHECKSUMS_FILE)).decode(errors="replace").splitlines()
    except DataError as error:
        yield _unreadable(folder, CHECKSUMS_FILE, error)
        return
    for line in lines:
        expected, _, name = line.partition("  ")
        try:
            data = folder.read(folder.check_name(name))
        except DataError as error:
            yield _unreadable(folder, name, error)
            continue
        if hashlib.sha256(data).hexdigest() != expected:
            yield f"{folder.path(name)}: content is not that of its checksum in {CHECKSUMS_FILE}"


def _unreadable(folder: DataFolder, name: str, error: DataError) -> str:
    return f"{folder.path(name)}: missing" if isinstance(error, MissingFileError) else str(error)


def _shard_faults(folder: DataFolder, shard: str, index: str, tokenizer: Tokenizer) -> Iterator[str]:
    path = folder.path(shard)
    try:
        header, records = parse_index(folder.path(index), folder.read(index))
        data = folder.read(shard)
    except DataError as error:
        yield _unreadable(folder, shard, error)
        return
    if header.tokenizer_sha256 != tokenizer.sha256:
        yield f"{folder.path(index)}: tokens were counted with another tokenizer than {TOKENIZER_FILE}"
    if len(data) != header.shard_bytes:
        yield f"{path}: has {len(data)} bytes, its index says {header.shard_bytes}"
    try:
        members, foreign = _read_members(data)
    except tarfile.TarError as error:
        yield f"{path}: cannot be read to its end ({error})"
        return
    for name in foreign:
        yield f"{path}, member {name!r}: is a link, no file, or leads out of the shard"
    for record in records:
        for fault in _sample_faults(record, members, tokenizer):
            yield f"{path}, sample {record.key}: {fault}"
    known = {record.key for record in records}
    for name in members:
        if name.partition(".")[0] not in known:
            yield f"{path}, member {name}: belongs to no sample of the index"


def _read_members(data: bytes) -> tuple[Members, list[str]]:
    """Files up to where the shard ends, orderly or not, and the names of members that are none."""
    members: Members = {}
    foreign = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        try:
            for member in tar:
                # Nothing is unpacked, but other readers of the shard might.
                if not member.isreg() or "/" in member.name or "\\" in member.name:
                    foreign.append(member.name)
                    continue
                start = member.offset_data
                members[member.name] = (start, data[start : start + member.size])
        except tarfile.ReadError:
            # The samples missing then are reported one by one.
            pass
    return members, foreign


def _sample_faults(record: SampleRecord, members: Members, tokenizer: Tokenizer) -> Iterator[str]:
    offset, data = members.get(f"{record.key}.json", (-1, b""))
    if (offset, len(data)) != (record.offset, record.num_bytes):
        yield f"no {record.key}.json of {record.num_bytes} bytes at byte {record.offset}, as the index says"
        return
    try:
        texts = parse_words(data, record)
        content = parse_sample(data)
    except SampleError as error:
        yield error.reason
        return
    segments = content["segments"]
    same = (content.get("kind"), content.get("source")) == (record.kind, record.source)
    if not same:
        yield "kind, source or both differ from the index"
        return
    has_media = any(isinstance(segment, MediaSegment) for segment in record.segments)
    if has_media == (record.kind == "text"):
        yield f"is of kind {record.kind} {'with' if has_media else 'without'} an image or video"
    if record.num_text_tokens == 0:
        yield "has no text"
    for segment, described, text in zip(record.segments, segments, texts, strict=True):
        if isinstance(segment, TextSegment):
            yield from _text_faults(segment, described, text, tokenizer)
        else:
            yield from _media_faults(record.key, segment, described, members)


def _text_faults(
    segment: TextSegment, described: dict[str, Any], words: Words, tokenizer: Tokenizer
) -> Iterator[str]:
    if described.get("type") != "text" or described.get("loss") != segment.loss:
        yield "a text segment differs from the index"
        return
    try:
        num_tokens = len(tokenizer.encode(words.text))
        part_tokens = tokenizer.part_tokens(words.text)
    except RuntimeError as error:
        yield str(error)
        return
    if num_tokens != segment.num_tokens:
        yield f"text has {num_tokens} tokens, the index says {segment.num_tokens}"
    if words.part_tokens and words.part_tokens != part_tokens:
        yield f"a text's parts have {part_tokens} tokens, not {words.part_tokens}"


def _media_faults(
    key: str, segment: MediaSegment, described: dict[str, Any], members: Members
) -> Iterator[str]:
    name = f"{key}.{described.get('member')}"
    if described.get("type") != segment.type or name not in members:
        yield f"has no {segment.type} {name}"
        return
    offset, data = members[name]
    if (offset, len(data)) != (segment.offset, segment.num_bytes):
        yield f"{name}: {len(data)} bytes at {offset}; the index says {segment.num_bytes} at {segment.offset}"
        return
    for fault in media_faults(data, segment):
        yield f"{name} {fault}"
