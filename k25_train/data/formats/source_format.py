"""What a format has to say of itself."""

from collections.abc import Callable
from dataclasses import dataclass

from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.reader import SourceReader
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """A format, whose sources have index files."""

    list_shards: Callable[[SourceFiles], list[ShardInfo]]
    """The files that items lie in, in the order of the index; those of a split follow one another."""
    index_shard: Callable[[SourceFiles, ShardInfo, Tokenizer, IndexWriter], None]
    """Walks one of these files and adds it (`add_shard`, with what its `facts` are to be) and its items to
    the writer. Runs in a process of its own."""
    make_reader: Callable[[SourceFiles, SourceIndex, Tokenizer], SourceReader]
    """What reads its samples."""
    frame: bool = True
    """Whether documents are put between [BOS] and [EOS]."""
    keeps_keys: bool = False
    """Whether items have names by which users know them."""
    keeps_kinds: bool = False
    """Whether items have a kind that is not known by their media."""
