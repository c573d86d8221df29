"""Opens a source by its index file, and checks that index, files and vocabulary belong together."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from k25_train.config.basics import is_url
from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceFormat
from k25_train.data.format_specs import spec_of
from k25_train.data.formats.index_cache import local_index
from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.formats.index_prefix import MissingIndexError
from k25_train.data.formats.reader import SourceReader
from k25_train.data.formats.source_files import SourceFiles, index_command
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.storage.stamps import Version
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

REQUESTS_AT_ONCE = 32
"""Files that are asked for their size at the same time. Our choice."""


class StaleIndexError(DataError):
    """An index is not of the files, or of the vocabulary, that there are now."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A source with its index and what reads it."""

    name: str
    """Its key in `data.sources`."""
    index: SourceIndex
    """Of all its items; `index.header.splits` says which are held out, where the format says it."""
    reader: SourceReader
    """Reads them."""

    def items_of(self, split: str) -> tuple[int, int]:
        """First item of a split and the one after its last. A format without splits has all in `train`.

        Raises DataError for a split that it has not.
        """
        splits = self.index.header.splits or {"train": (0, len(self.index))}
        if split not in splits:
            raise DataError(
                f"{self.reader.directory}: has no split {split!r}, only {', '.join(splits)}. Add one, and "
                "index "
                f"the source again: {index_command(self.name)}."
            )
        return splits[split]


def open_source(name: str, data: DataConfig, tokenizer: Tokenizer, *, checks_shards: bool) -> Source:
    """Open one of `data.sources` by its index file.

    With `checks_shards`, which one rank does for all, each of its files is held against the index; without,
    the cost is the same for any number of files and items. Raises MissingIndexError, StaleIndexError or
    IndexFileError, naming file and remedy.
    """
    files = SourceFiles(name, data)
    spec = spec_of(files.config.format)
    index = open_index(files, tokenizer, data.cache_dir)
    files.folder.expect(partial(indexed_version, index))
    if checks_shards:
        check_shards(files, index)
    return Source(name, index, spec.make_reader(files, index, tokenizer))


def open_index(files: SourceFiles, tokenizer: Tokenizer, cache_dir: str | None) -> SourceIndex:
    """The index of a source, mapped; one at a URL is copied to this node's disk once.

    Raises as `open_source`.
    """
    try:
        path = local_index(files.index, cache_dir) if is_url(files.index) else files.index
        index = SourceIndex.open(path, files.name)
    except MissingIndexError as error:
        raise MissingIndexError(
            f"{files.index}: no such index, so {files.key}={files.path} cannot be read. Make it with "
            f"{index_command(files.name)}, or name it with data.sources.{files.name}.index."
        ) from error
    header = index.header
    if header.format != files.config.format.value:
        raise StaleIndexError(
            f"{files.index}: is an index of format {header.format}, data.sources.{files.name}.format is "
            f"{files.config.format.value}. Correct one of the two, or make it again: "
            f"{index_command(files.name)}."
        )
    kinds = header.facts.get("kinds", [])
    if kinds != files.kinds:
        raise StaleIndexError(
            f"{files.index}: has the kinds {kinds or 'all'}, data.sources.{files.name}.kinds are "
            f"{files.kinds or 'all'}. Give each its own data.sources.NAME.index, or none."
        )
    if header.tokenizer_sha256 != tokenizer.sha256:
        # The ids of tokens lie in the files of one format, for which another index would not be enough.
        is_tokenized = files.config.format is SourceFormat.indexed
        first = "if the files were tokenized with this one, " if is_tokenized else ""
        raise StaleIndexError(
            f"{files.index}: tokens were counted with vocabulary {header.tokenizer_sha256[:12]}…, this is "
            f"{tokenizer.sha256[:12]}…. Set data.tokenizer to that vocabulary, or {first}make the index "
            f"again: {index_command(files.name)}."
        )
    if not len(index):
        raise DataError(f"{files.index}: has no item. Correct {files.key}, or leave the source out.")
    return index


def indexed_version(index: SourceIndex, name: str) -> Version | None:
    """A file as it was when it was indexed; None for one that the index does not name."""
    try:
        shard = index.shard_named(name)
    except KeyError:
        return None
    return Version(shard.num_bytes, shard.stamp)


def check_shards(files: SourceFiles, index: SourceIndex) -> None:
    """Hold every file of a source against its index. Raises StaleIndexError, naming the first that
    differs."""
    for shard, found in zip(
        index.shards(), infos(files, (each.name for each in index.shards())), strict=True
    ):
        difference = difference_of(shard, found)
        if difference:
            raise StaleIndexError(
                f"{files.root}/{shard.name}: {difference}. If it was meant to change, index the source "
                "again: "
                f"{index_command(files.name)}; else bring back the file that was indexed."
            )


def difference_of(indexed: ShardInfo, found: ShardInfo) -> str:
    """What of a file is not as it was when it was indexed, to continue its name; empty if nothing is."""
    if found.num_bytes != indexed.num_bytes:
        how = "cut short or replaced" if found.num_bytes < indexed.num_bytes else "changed"
        return f"has {found.num_bytes} bytes but had {indexed.num_bytes} when it was indexed; it was {how}"
    if indexed.stamp and found.stamp and found.stamp != indexed.stamp:
        return f"was written since it was indexed ({found.stamp}, not {indexed.stamp})"
    return ""


def infos(files: SourceFiles, names: Iterable[str]) -> list[ShardInfo]:
    """Files as they are now, many at a time."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(files.info, names))
