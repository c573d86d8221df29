"""Shard sets as sources: an index of the samples of some kinds, made of the JSON lines next to the shards.

Sources that read other kinds of a set have indexes of their own (`shards-KIND.k25index`). A set of fewer than
`MOST_IN_MEMORY` samples needs none: it is read into memory by each process that plans.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.dataset import Manifest, check_shard, load_manifest
from k25_train.data.formats.index import IndexHeader, parse_header, parse_index
from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.left_out import facts_of
from k25_train.data.formats.reader import SourceReader, WordsReader
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.formats.source_files import SourceFiles, index_command
from k25_train.data.formats.source_format import FormatSpec
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

MOST_IN_MEMORY = 100_000
"""Samples of a set that is trained on without an index: about 100 MB in each process. Our choice."""
_HEADER_BYTES = 1 << 12
"""More than the first line of an index has."""
_REQUESTS_AT_ONCE = 32


def list_shards(files: SourceFiles) -> list[ShardInfo]:
    """The shards of all splits, with the sizes that the set says they have."""
    manifest = load_manifest(files.root)
    named = [(split, shard, index) for split, each in manifest.shards.items() for shard, index in each]

    def info(split: str, shard: str, index: str) -> ShardInfo:
        header = _header(manifest, index)
        found = files.info(
            shard,
            split=split,
            format_version=header.format_version,
            has_checksums=header.format_version > 1,
            facts={"index": index, "index_bytes": manifest.folder.num_bytes(index)},
        )
        # Checksums show at each read that a shard is another one: a copy of a set needs no other index.
        return replace(found, stamp="") if found.has_checksums else found

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(info, *zip(*named, strict=True))) if named else []


def index_shard(files: SourceFiles, shard: ShardInfo, tokenizer: Tokenizer, writer: IndexWriter) -> None:
    """Add the samples of the source's kinds; one that is not what its kind says is left out.

    Raises DataError as `load_dataset` does.
    """
    folder, name = files.folder, shard.facts["index"]
    header, records = parse_index(folder.path(name), folder.read(name))
    check_shard(folder, shard.name, name, header, "the vocabulary (data.tokenizer)", tokenizer.sha256)
    chosen = [record for record in records if record.kind in (files.kinds or SAMPLE_KINDS)]
    writer.add_shard(replace(shard, facts=facts_of(list(_misfits(chosen)))))
    for record in chosen:
        if not _is_misfit(record):
            writer.add(record)


def _misfits(records: list[SampleRecord]) -> Iterator[str]:
    for record in filter(_is_misfit, records):
        has = "has" if record.media else "has no"
        yield f"{record.shard}, sample {record.key}: its kind is {record.kind} but it {has} image or video"


def _is_misfit(record: SampleRecord) -> bool:
    return (record.kind == "text") == bool(record.media)


def make_reader(files: SourceFiles, index: SourceIndex, tokenizer: Tokenizer) -> SourceReader:
    """What reads words and media of a set."""
    reader = ShardReader(files.folder)
    return WordsReader(reader, reader.read_words, tokenizer)


def check_small(name: str, manifest: Manifest) -> None:
    """Raises DataError, with the command that makes an index, for a set that is not to be held in memory."""
    indexes = [index for entries in manifest.shards.values() for _, index in entries]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        num_samples = sum(pool.map(lambda index: _header(manifest, index).num_samples, indexes))
    if num_samples >= MOST_IN_MEMORY:
        raise DataError(
            f"{manifest.folder.directory}: has {num_samples} samples and no index for data.sources.{name}; "
            f"sets of {MOST_IN_MEMORY} and more need one. Make it with {index_command(name)}."
        )


def _header(manifest: Manifest, index: str) -> IndexHeader:
    line, _, _ = manifest.folder.read_range(index, 0, _HEADER_BYTES).partition(b"\n")
    return parse_header(manifest.folder.path(index), line)


SHARDS = FormatSpec(
    list_shards=list_shards,
    index_shard=index_shard,
    make_reader=make_reader,
    keeps_keys=True,
    keeps_kinds=True,
)
