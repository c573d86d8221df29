"""The shard set on disk: its manifest, and the checks that its files belong together.

A shard set is one directory (local, or any fsspec URL):

    dataset.json               format version, tokenizer file, splits, sources with their licences
    tokenizer.json             the tokenizer that counted the tokens in every index
    <split>-00000.tar          samples in WebDataset naming; media members keep their native file format
    <split>-00000.index.jsonl  one header line, then one line per sample: where it is and how large it is
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from k25_train.data.folder import DataFolder, MissingFileError, read_file
from k25_train.data.formats.index import IndexHeader, parse_index
from k25_train.data.formats.records import FORMAT_VERSION, READABLE_VERSIONS, SampleRecord
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


class Manifest(NamedTuple):
    """What `dataset.json` says."""

    folder: DataFolder
    """Of the set."""
    shards: dict[str, list[tuple[str, str]]]
    """Split -> names of its shards and of their indexes."""
    sources: tuple[SourceInfo, ...]
    """Where its samples come from."""
    tokenizer_path: str
    """The set's own tokenizer."""


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


def load_manifest(directory: str) -> Manifest:
    """Read what a shard set consists of. All that it names is inside the folder.

    Raises DataError, naming the file and what is wrong, for no or malformed `dataset.json`.
    """
    folder = DataFolder(directory)
    manifest = _read_manifest(folder)
    try:
        shards = {
            str(split): [(folder.check_name(e["shard"]), folder.check_name(e["index"])) for e in entries]
            for split, entries in manifest["splits"].items()
        }
        sources = tuple(SourceInfo(**source) for source in manifest["sources"])
        tokenizer_path = folder.path(folder.check_name(manifest["tokenizer"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{directory}/{MANIFEST}: malformed ({error!r}). Run {_BUILD} again.") from error
    return Manifest(folder, shards, sources, tokenizer_path)


def load_dataset(directory: str, tokenizer_path: str | None = None) -> Dataset:
    """Read manifest and indexes of a shard set and check that they fit the files.

    `tokenizer_path` replaces the set's own tokenizer file; it must be the one its tokens were counted with.
    Raises DataError, naming the file and what is wrong, for: no or malformed `dataset.json`, a shard that is
    missing or whose size is not its index's, an incomplete index, a tokenizer that is not the index's.
    """
    # 1. What there is; the user's own tokenizer may be anywhere.
    folder, shards, sources, own_tokenizer = load_manifest(directory)
    tokenizer_path = tokenizer_path or own_tokenizer
    tokenizer_sha256 = hashlib.sha256(read_file(tokenizer_path, "tokenizer", "data.tokenizer")).hexdigest()

    # 2. Its indexes, each checked against its shard and the tokenizer.
    splits: dict[str, tuple[SampleRecord, ...]] = {}
    for split, entries in shards.items():
        records: list[SampleRecord] = []
        for shard, index in entries:
            header, found = parse_index(folder.path(index), folder.read(index))
            check_shard(folder, shard, index, header, tokenizer_path, tokenizer_sha256)
            records += found
        splits[split] = tuple(records)
    return Dataset(
        directory=directory,
        tokenizer_path=tokenizer_path,
        tokenizer_sha256=tokenizer_sha256,
        splits=splits,
        sources=sources,
        reader=ShardReader(folder),
    )


def _read_manifest(folder: DataFolder) -> dict[str, Any]:
    path = folder.path(MANIFEST)
    try:
        manifest = json.loads(folder.read(folder.check_name(MANIFEST)))
    except MissingFileError as error:
        raise DataError(
            f"{path}: no such file, so data.dir={folder.directory} is no (complete) shard set. Run {_BUILD}, "
            "or point data.dir at one."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Run {_BUILD} again.") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in READABLE_VERSIONS:
        raise DataError(
            f"{path}: format_version is {version}, this code reads {READABLE_VERSIONS}. Run {_BUILD} again."
        )
    return dict(manifest)


def check_shard(
    folder: DataFolder,
    shard: str,
    index: str,
    header: IndexHeader,
    tokenizer_path: str,
    tokenizer_sha256: str,
) -> None:
    """Hold a shard and the vocabulary against the header of the shard's index. Raises DataError, naming what
    is wrong."""
    if header.shard != shard:
        raise DataError(f"{folder.path(index)}: indexes {header.shard!r}, but {MANIFEST} says {shard}.")
    try:
        size = folder.num_bytes(shard)
    except MissingFileError as error:
        raise DataError(
            f"{folder.path(shard)}: no such shard, though {MANIFEST} lists it. Bring it back, or run "
            f"{_BUILD} again."
        ) from error
    if size != header.shard_bytes:
        what = "cut short" if size < header.shard_bytes else "not the one indexed"
        raise DataError(
            f"{folder.path(shard)}: has {size} bytes but its index says {header.shard_bytes}; it is "
            f"{what}. Copy it again from where it was built, or run {_BUILD} again."
        )
    if header.tokenizer_sha256 != tokenizer_sha256:
        raise DataError(
            f"{folder.path(index)}: tokens were counted with tokenizer {header.tokenizer_sha256[:12]}… "
            f"but {tokenizer_path} is {tokenizer_sha256[:12]}…. Use that tokenizer (data.tokenizer), or "
            "build the shard set with this one."
        )
