"""Sources of tar shards: which files they are, how each is indexed, and what reads them."""

import hashlib
from dataclasses import replace
from functools import lru_cache

from k25_train.config.sources import SourceFormat
from k25_train.data.folder import DataFolder
from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.left_out import facts_of
from k25_train.data.formats.reader import SourceReader, WordsReader
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_format import FormatSpec
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.tar.energon import EnergonFolder, load_energon
from k25_train.data.tar.indexer import TarIndexer
from k25_train.data.tar.layouts import Layout, StemLayout
from k25_train.data.tar.members import ReadAhead, Skip
from k25_train.data.tar.reader import TarReader
from k25_train.data.tokenizer import Tokenizer


def list_webdataset(files: SourceFiles) -> list[ShardInfo]:
    """All `.tar` files that the path names, those in folders of a folder too."""
    return [files.info(name) for name in files.find((".tar",), in_folders="**/*")]


def list_energon(files: SourceFiles) -> list[ShardInfo]:
    """The shards of the splits that energon has made."""
    found = load_energon(files.folder)
    layout = hashlib.sha256(repr(found.layout).encode()).hexdigest()
    return [
        files.info(
            shard.name,
            split=shard.split,
            facts={
                "num_samples": shard.num_samples,
                "excluded": sorted(shard.excluded),
                "layout_sha256": layout,
            },
        )
        for shard in found.shards
    ]


def index_shard(files: SourceFiles, shard: ShardInfo, tokenizer: Tokenizer, writer: IndexWriter) -> None:
    """Add the samples of a shard; its facts say what is left out, and why."""
    folder = files.folder
    ahead = ReadAhead(
        lambda offset, num_bytes: folder.read_range(shard.name, offset, num_bytes), shard.num_bytes
    )
    excluded = frozenset(shard.facts.get("excluded", ()))
    layout: Layout = StemLayout()
    if "layout_sha256" in shard.facts:
        layout = _energon(files.root, shard.facts["layout_sha256"]).layout
    found = list(TarIndexer(shard.name, ahead.read, shard.num_bytes, layout, tokenizer, excluded))
    skips = [each for each in found if isinstance(each, Skip)]
    num_seen = sum(bool(skip.key) for skip in skips) + len(found) - len(skips) + len(excluded)
    counted = shard.facts.get("num_samples")
    if counted is not None and counted != num_seen:
        reason = f"has {num_seen} samples, .nv-meta says {counted}; run `energon prepare` again"
        skips.append(Skip(shard.name, "", 0, reason))
    writer.add_shard(replace(shard, facts={**shard.facts, **facts_of(skips)}))
    if "layout_sha256" in shard.facts:
        # Splits and fields are .nv-meta's: the index is stale when that changes, as when a shard does.
        for name in _energon(files.root, shard.facts["layout_sha256"]).meta:
            writer.add_shard(files.info(name))
    for each in found:
        if isinstance(each, SampleRecord):
            writer.add(each)


def make_reader(files: SourceFiles, index: SourceIndex, tokenizer: Tokenizer) -> SourceReader:
    """What reads words and media of a source."""
    is_energon = files.config.format is SourceFormat.energon
    layout = load_energon(files.folder).layout if is_energon else StemLayout()
    reader = TarReader(files.folder, layout)
    return WordsReader(reader, reader.read_words, tokenizer)


@lru_cache
def _energon(root: str, layout_sha256: str) -> EnergonFolder:
    """What `.nv-meta` says, read once for all shards that a process indexes, and again when it changes."""
    return load_energon(DataFolder(root))


WEBDATASET = FormatSpec(
    list_shards=list_webdataset, index_shard=index_shard, make_reader=make_reader, keeps_keys=True
)
ENERGON = replace(WEBDATASET, list_shards=list_energon)
