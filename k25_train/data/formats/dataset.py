"""The shard set on disk: its manifest, and the checks that its files belong together.

A shard set is one directory (local, or any fsspec URL):

    dataset.json               format version, tokenizer file, splits, sources with their licences
    tokenizer.json             the tokenizer that counted the tokens in every index
    <split>-00000.tar          samples in WebDataset naming; media members keep their native file format
    <split>-00000.index.jsonl  one header line, then one line per sample: where it is and how large it is
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from k25_train.data.formats.index import FORMAT_VERSION, file_sha256, read_index, read_index_header
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.formats.shard_writer import index_path
from k25_train.errors import DataError

MANIFEST = "dataset.json"
_BUILD = "`python -m k25_train.data build`"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """Where samples come from, recorded in `dataset.json`."""

    name: str
    version: str
    registry: str
    licence: str
    files: int
    samples: int


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
