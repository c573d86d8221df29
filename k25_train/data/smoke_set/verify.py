"""Re-reads a shard set byte by byte and names every file that is not what it should be.

Loading checks only what a run needs before its first step; here every member is decoded and compared with the
index, and every file with its checksum.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from k25_train.data.decode.frames import probe_media
from k25_train.data.formats.dataset import MANIFEST
from k25_train.data.formats.index import read_index, read_index_header
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.smoke_set.build import TOKENIZER_FILE
from k25_train.data.smoke_set.provenance import CHECKSUMS_FILE
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError

Members = dict[str, tuple[int, bytes]]
"""Member name -> offset of its data in the shard, and the data."""


def verify_dataset(directory: Path, report: Callable[[str], None]) -> list[str]:
    """All faults of a shard set, each a line that starts with the file; `report` gets one line per shard.

    Finds: a missing, changed or cut file, media that do not decode or differ in size from the index, a sample
    without the media or the text its kind needs, token counts that are not the tokenizer's, and samples that
    only the shard or only the index has.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        entries = [entry for split in manifest["splits"].values() for entry in split]
        tokenizer = load_tokenizer(directory / manifest["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{directory / MANIFEST}: not readable as a manifest ({error!r})"]
    except DataError as error:
        return [str(error)]
    faults = list(_checksum_faults(directory))
    for entry in entries:
        found = list(_shard_faults(directory, entry["shard"], entry["index"], tokenizer))
        report(f"{entry['shard']}: {len(found) or 'no'} fault{'s' * (len(found) != 1)}")
        faults += found
    return faults


def _checksum_faults(directory: Path) -> Iterator[str]:
    path = directory / CHECKSUMS_FILE
    if not path.is_file():
        yield f"{path}: missing"
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        file = directory / name
        if not file.is_file():
            yield f"{file}: missing"
        elif hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            yield f"{file}: content is not that of its checksum in {CHECKSUMS_FILE}"


def _shard_faults(directory: Path, shard: str, index: str, tokenizer: Tokenizer) -> Iterator[str]:
    try:
        header = read_index_header(str(directory / index))
        records = read_index(str(directory / index))
    except DataError as error:
        yield str(error)
        return
    if header.tokenizer_sha256 != tokenizer.sha256:
        yield f"{directory / index}: tokens were counted with another tokenizer than {TOKENIZER_FILE}"
    path = directory / shard
    try:
        if path.stat().st_size != header.shard_bytes:
            yield f"{path}: has {path.stat().st_size} bytes, its index says {header.shard_bytes}"
        members = _read_members(path)
    except (OSError, tarfile.TarError) as error:
        yield f"{path}: cannot be read to its end ({error})"
        return
    for record in records:
        for fault in _sample_faults(record, members, tokenizer):
            yield f"{path}, sample {record.key}: {fault}"
    known = {record.key for record in records}
    for name in members:
        if name.partition(".")[0] not in known:
            yield f"{path}, member {name}: belongs to no sample of the index"


def _read_members(path: Path) -> Members:
    """Read up to where the shard ends, orderly or not."""
    members: Members = {}
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    members[member.name] = (member.offset_data, file.read())
        except tarfile.ReadError:
            # The samples missing then are reported one by one.
            pass
    return members


def _sample_faults(record: SampleRecord, members: Members, tokenizer: Tokenizer) -> Iterator[str]:
    offset, data = members.get(f"{record.key}.json", (-1, b""))
    if (offset, len(data)) != (record.offset, record.num_bytes):
        yield f"no {record.key}.json of {record.num_bytes} bytes at byte {record.offset}, as the index says"
        return
    try:
        content = json.loads(data)
        segments = list(content["segments"])
        same = (content["kind"], content["source"]) == (record.kind, record.source)
    except (ValueError, KeyError, TypeError) as error:
        yield f"{record.key}.json is no sample ({error!r})"
        return
    if not same or len(segments) != len(record.segments):
        yield "kind, source or number of segments differ from the index"
        return
    has_media = any(isinstance(segment, MediaSegment) for segment in record.segments)
    if has_media == (record.kind == "text"):
        yield f"is of kind {record.kind} {'with' if has_media else 'without'} an image or video"
    if record.num_text_tokens == 0:
        yield "has no text"
    for segment, described in zip(record.segments, segments, strict=True):
        if isinstance(segment, TextSegment):
            yield from _text_faults(segment, described, tokenizer)
        else:
            yield from _media_faults(record.key, segment, described, members)


def _text_faults(segment: TextSegment, described: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    if described.get("type") != "text" or described.get("loss") != segment.loss:
        yield "a text segment differs from the index"
        return
    num_tokens = len(tokenizer.encode(described["text"]))
    if num_tokens != segment.num_tokens:
        yield f"text has {num_tokens} tokens, the index says {segment.num_tokens}"


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
    if not data:
        yield f"{name} is empty"
        return
    try:
        info = probe_media(data, segment.type, segment.format)
    except DataError as error:
        yield f"{name} {error}"
        return
    if (info.width, info.height, info.num_frames) != (segment.width, segment.height, segment.num_frames):
        yield (
            f"{name} is {info.width}x{info.height} in {info.num_frames} frame(s), the index says "
            f"{segment.width}x{segment.height} in {segment.num_frames}"
        )
