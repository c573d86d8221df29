"""The format `chat` as a source has it: files, index, reader."""

from dataclasses import replace

from k25_train.data.chat.chat_tokens import ChatTokens
from k25_train.data.chat.indexer import ChatIndexer, Skipped
from k25_train.data.chat.media_files import LINE_SUFFIXES
from k25_train.data.chat.reader import ChatReader
from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.left_out import LISTED, facts_of
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_format import FormatSpec
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

STRETCH_BYTES = 2**28
"""A larger file is indexed by several processes at once, each a stretch of it. Our choice."""


HELDOUT = "heldout"
"""Folder, or file but for its suffix, whose conversations are held out."""


def list_shards(files: SourceFiles) -> list[ShardInfo]:
    """Every file with conversations that the path names, once for each of its stretches.

    If some are called `heldout`, or lie in a folder of that name, these are a split of their own. Raises
    DataError if all are, or if the configuration holds out conversations of the others, too.
    """
    named = tuple(suffix for suffix in LINE_SUFFIXES if files.path.endswith(suffix))
    names = files.find(named or LINE_SUFFIXES)
    of_split = {"train": [name for name in names if not _is_heldout(name)]}
    of_split[HELDOUT] = [name for name in names if _is_heldout(name)]
    has_splits = bool(of_split[HELDOUT])
    if has_splits and (files.config.heldout or not of_split["train"]):
        problem = (
            f"data.sources.{files.name}.heldout is {files.config.heldout}, but its files say what is held "
            f"out, {of_split[HELDOUT][0]} the first: use 0"
            if files.config.heldout
            else f"{files.key}={files.path}: all of its files are held out by their names; name others, too"
        )
        raise DataError(f"{problem}.")
    found = [
        files.info(name, split=split if has_splits else "")
        for split, each in of_split.items()
        for name in each
    ]
    return [
        replace(shard, facts={"start": start, "stop": min(start + STRETCH_BYTES, shard.num_bytes)})
        for shard in found
        for start in range(0, shard.num_bytes or 1, STRETCH_BYTES)
    ]


def _is_heldout(name: str) -> bool:
    *folders, file = name.split("/")
    return HELDOUT in folders or file.partition(".")[0] == HELDOUT


def index_shard(files: SourceFiles, shard: ShardInfo, tokenizer: Tokenizer, writer: IndexWriter) -> None:
    """Add the conversations of a stretch of a file, and the files of their media.

    Facts of the file say which lines have no conversation, and why. Raises DataError, naming the file, if no
    line has one, and for a vocabulary without chat tokens.
    """
    indexer = ChatIndexer(files.folder, ChatTokens(tokenizer, _vocabulary(files)))
    writer.add_shard(replace(shard, facts={}))
    num_left_out, left_out = 0, list[str]()
    for found in indexer.index(shard.name, shard.facts["start"], shard.facts["stop"]):
        if isinstance(found, Skipped):
            num_left_out += 1
            if num_left_out <= LISTED:
                left_out.append(f"{shard.name}, line {found.line}: {found.reason}")
            continue
        for medium in found.media:
            if not writer.has_shard(medium.shard):
                writer.add_shard(files.info(medium.shard))
        writer.add(found)
    is_whole = shard.facts["stop"] - shard.facts["start"] == shard.num_bytes
    if left_out and is_whole and not writer.num_items:
        raise DataError(
            f"{files.folder.path(shard.name)}: none of its {num_left_out} lines is a conversation to learn "
            f"from; the first: {left_out[0]}. Correct the file, or leave it out of the source's path."
        )
    if left_out:
        writer.add_facts(shard.name, facts_of(left_out, num_left_out))


def make_reader(files: SourceFiles, index: SourceIndex, tokenizer: Tokenizer) -> ChatReader:
    """What reads the conversations of an index."""
    return ChatReader(ShardReader(files.folder), ChatTokens(tokenizer, _vocabulary(files)))


def _vocabulary(files: SourceFiles) -> str:
    """The vocabulary, as messages about the source name it."""
    return f"the vocabulary (data.tokenizer) for data.sources.{files.name}"


CHAT = FormatSpec(list_shards=list_shards, index_shard=index_shard, make_reader=make_reader, frame=False)
