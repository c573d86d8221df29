"""Shards: plain tar files of samples in native media formats, written in order, read at random by offset.

Members follow WebDataset's naming: those with the same stem are one sample. `<key>.json` holds kind, source,
licence and the segments with their words; `<key>.<position>.<format>` holds a media file as it was found.
"""

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from k25_train.config.data import SAMPLE_KINDS
from k25_train.data.formats.index import (
    FORMAT_VERSION,
    IndexHeader,
    MediaSegment,
    SampleRecord,
    Segment,
    TextSegment,
    file_sha256,
    read_index,
    read_index_header,
    write_index,
)
from k25_train.errors import DataError

MANIFEST = "dataset.json"
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BUILD = "`python -m k25_train.data build`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """Text to be written; `num_tokens` as counted by the shard set's tokenizer, without special tokens."""

    text: str
    num_tokens: int
    loss: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPart:
    """A media file to be written as it is; sizes as `images.probe_media` reports them."""

    type: str
    """`image` or `video`."""
    data: bytes
    format: str
    width: int
    height: int
    num_frames: int = 1
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """Where samples come from, recorded in `dataset.json`."""

    name: str
    version: str
    registry: str
    licence: str
    files: int
    samples: int


class ShardWriter:
    """Context manager that writes one shard `<name>.tar` and its `<name>.index.jsonl`.

    Both appear under their names only when the block ends without an error; equal calls give equal bytes.
    """

    def __init__(self, path: Path, tokenizer_sha256: str) -> None:
        """`path`: the `.tar` to write; `tokenizer_sha256`: of the tokenizer that counted the tokens."""
        self.path = path
        self.index_path = index_path(path)
        self.tokenizer_sha256 = tokenizer_sha256
        self._records: list[SampleRecord] = []
        self._keys: set[str] = set()
        self._partial_path = path.with_name(path.name + ".partial")

    def __enter__(self) -> Self:
        self._tar = tarfile.open(self._partial_path, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is not None:
            self._partial_path.unlink()
            return
        header = IndexHeader(
            format_version=FORMAT_VERSION,
            shard=self.path.name,
            shard_bytes=self._partial_path.stat().st_size,
            tokenizer_sha256=self.tokenizer_sha256,
            num_samples=len(self._records),
        )
        partial_index = self.index_path.with_name(self.index_path.name + ".partial")
        write_index(str(partial_index), header, self._records)
        self._partial_path.rename(self.path)
        partial_index.rename(self.index_path)

    def add(
        self, key: str, kind: str, source: str, licence: str, parts: Sequence[TextPart | MediaPart]
    ) -> SampleRecord:
        """Append one sample and return its record.

        Raises DataError if the key is used twice or has characters other than letters, digits, `_` and `-`
        (a dot would end the stem), or if the kind is unknown.
        """
        if not _KEY.fullmatch(key) or key in self._keys:
            raise DataError(
                f"{self.path}: sample key {key!r} is taken or has characters other than [A-Za-z0-9_-]."
            )
        if kind not in SAMPLE_KINDS:
            raise DataError(
                f"{self.path}: sample {key!r} has kind {kind!r}, known kinds are {', '.join(SAMPLE_KINDS)}."
            )
        segments: list[Segment] = []
        segments_json: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, TextPart):
                segments.append(TextSegment(num_tokens=part.num_tokens, loss=part.loss))
                segments_json.append({"type": "text", "text": part.text, "loss": part.loss})
            else:
                member = f"{len(segments)}.{part.format}"
                segments.append(self._add_media(f"{key}.{member}", part))
                segments_json.append({"type": part.type, "member": member})
        content = {"kind": kind, "source": source, "licence": licence, "segments": segments_json}
        data = json.dumps(content, ensure_ascii=False).encode()
        record = SampleRecord(
            shard=self.path.name,
            key=key,
            kind=kind,
            source=source,
            offset=self._add_member(f"{key}.json", data),
            num_bytes=len(data),
            segments=tuple(segments),
        )
        self._keys.add(key)
        self._records.append(record)
        return record

    def _add_media(self, name: str, part: MediaPart) -> MediaSegment:
        return MediaSegment(
            type=part.type,
            shard=self.path.name,
            offset=self._add_member(name, part.data),
            num_bytes=len(part.data),
            format=part.format,
            width=part.width,
            height=part.height,
            num_frames=part.num_frames,
            duration_s=part.duration_s,
        )

    def _add_member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded_size = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded_size


def index_path(shard_path: Path) -> Path:
    """`<name>.index.jsonl` beside `<name>.tar`."""
    return shard_path.with_name(shard_path.stem + ".index.jsonl")


def write_manifest(
    directory: Path, tokenizer: str, splits: dict[str, list[str]], sources: Sequence[SourceInfo]
) -> None:
    """Write `dataset.json`, last, when all it names exists: split name -> shard file names."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer,
        "splits": {
            split: [{"shard": shard, "index": index_path(Path(shard)).name} for shard in shards]
            for split, shards in splits.items()
        },
        "sources": [asdict(source) for source in sources],
    }
    partial_path = directory / (MANIFEST + ".partial")
    partial_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial_path.rename(directory / MANIFEST)


class ShardReader:
    """Ranged reads from the shards of one directory.

    Stateless between calls (every read opens, seeks and closes), hence safe across threads and forks; on an
    object store each read is one ranged request.
    """

    def __init__(self, directory: str) -> None:
        """`directory` is a local path or any fsspec URL."""
        self.directory = directory
        self._fs, self._root = url_to_fs(directory)

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of `shard` from `offset`. Raises DataError if the shard ends before."""
        data = self._fs.cat_file(f"{self._root}/{shard}", start=offset, end=offset + num_bytes)
        if len(data) != num_bytes:
            raise DataError(
                f"{self.directory}/{shard}: bytes {offset} to {offset + num_bytes} were asked for and "
                f"{len(data)} are there; the shard was cut short while in use. Copy or build it again."
            )
        return data

    def read_texts(self, record: SampleRecord) -> tuple[str, ...]:
        """The words of a sample's segments, by position; an empty string stands for a media segment.

        Raises DataError if the `.json` member is not what the index says lies there.
        """
        data = self.read(record.shard, record.offset, record.num_bytes)
        try:
            texts = tuple(segment.get("text", "") for segment in json.loads(data)["segments"])
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{self.directory}/{record.shard}, sample {record.key}: no sample JSON at byte "
                f"{record.offset} ({error!r}); shard and index do not belong together. Run "
                f"{_BUILD} again."
            ) from error
        if len(texts) != len(record.segments):
            raise DataError(
                f"{self.directory}/{record.shard}, sample {record.key}: has {len(texts)} segments, the index "
                f"says {len(record.segments)}. Build the shard set again."
            )
        return texts

    def shard_bytes(self, shard: str) -> int:
        """Size of a shard. Raises DataError if it does not exist."""
        try:
            return int(self._fs.size(f"{self._root}/{shard}"))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.directory}/{shard}: no such shard, though {MANIFEST} lists it."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A shard set that passed its checks."""

    directory: str
    tokenizer_path: str
    tokenizer_sha256: str
    splits: dict[str, tuple[SampleRecord, ...]]
    """Split name (`train`, `heldout`) -> its samples in shard order."""
    sources: tuple[SourceInfo, ...]
    reader: ShardReader


def load_dataset(directory: str, tokenizer_path: str | None = None) -> Dataset:
    """Read manifest and indexes of a shard set and check that they fit the files.

    `tokenizer_path` replaces the set's own tokenizer file; it must be the one its tokens were counted with.
    Raises DataError, naming the file and what is wrong, for: no or malformed `dataset.json`, a shard that is
    missing or whose size is not its index's, an incomplete index, a tokenizer that is not the index's.
    """
    reader = ShardReader(directory)
    manifest = _read_manifest(directory)
    try:
        tokenizer_path = tokenizer_path or f"{directory}/{manifest['tokenizer']}"
        shards = {
            split: [(str(entry["shard"]), str(entry["index"])) for entry in entries]
            for split, entries in manifest["splits"].items()
        }
        sources = tuple(SourceInfo(**source) for source in manifest["sources"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{directory}/{MANIFEST}: malformed ({error!r}). Run {_BUILD} again.") from error
    tokenizer_sha256 = _tokenizer_sha256(tokenizer_path)
    splits: dict[str, tuple[SampleRecord, ...]] = {}
    for split, entries in shards.items():
        records: list[SampleRecord] = []
        for shard, index in entries:
            _check_shard(reader, shard, index, tokenizer_path, tokenizer_sha256)
            records += read_index(f"{directory}/{index}")
        splits[split] = tuple(records)
    return Dataset(
        directory=directory,
        tokenizer_path=tokenizer_path,
        tokenizer_sha256=tokenizer_sha256,
        splits=splits,
        sources=sources,
        reader=reader,
    )


def _read_manifest(directory: str) -> dict[str, Any]:
    fs, root = url_to_fs(directory)
    path = f"{directory}/{MANIFEST}"
    try:
        manifest = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file, so data.dir={directory} is no (complete) shard set. Run {_BUILD}, or "
            "point data.dir at one."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Run {_BUILD} again.") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {version}, this code reads {FORMAT_VERSION}. Run {_BUILD} again."
        )
    return dict(manifest)


def _tokenizer_sha256(path: str) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such tokenizer file. Set data.tokenizer, or run {_BUILD} again."
        ) from error


def _check_shard(
    reader: ShardReader, shard: str, index: str, tokenizer_path: str, tokenizer_sha256: str
) -> None:
    header = read_index_header(f"{reader.directory}/{index}")
    if header.shard != shard:
        raise DataError(f"{reader.directory}/{index}: indexes {header.shard}, but {MANIFEST} says {shard}.")
    size = reader.shard_bytes(shard)
    if size != header.shard_bytes:
        what = "cut short" if size < header.shard_bytes else "not the one indexed"
        raise DataError(
            f"{reader.directory}/{shard}: has {size} bytes but its index says {header.shard_bytes}; it is "
            f"{what}. Copy it again from where it was built, or run {_BUILD} again."
        )
    if header.tokenizer_sha256 != tokenizer_sha256:
        raise DataError(
            f"{reader.directory}/{index}: tokens were counted with tokenizer {header.tokenizer_sha256[:12]}… "
            f"but {tokenizer_path} is {tokenizer_sha256[:12]}…. Use that tokenizer (data.tokenizer), or "
            "build the shard set with this one."
        )
