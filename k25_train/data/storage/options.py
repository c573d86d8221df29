"""How this process reads: set once from the configuration, before files are opened.

Not passed along with each folder: deadline, cache and rate are a node's, whatever format asks for a file.
"""

from dataclasses import dataclass
from pathlib import Path

from k25_train.config.data import DataConfig
from k25_train.data.storage.block_cache import BlockCache, NoCache
from k25_train.data.storage.request_rate import NoLimit, RequestRate
from k25_train.errors import DataError


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What reads of files and objects go by."""

    timeout_s: float
    """Longest time of one attempt."""
    cache: BlockCache | NoCache
    """Of what comes from URLs."""
    rate: RequestRate | NoLimit
    """Of requests to object stores."""


_options = ReadOptions(60.0, NoCache(), NoLimit())


def read_options() -> ReadOptions:
    """Those that were set last."""
    return _options


def use_options(data: DataConfig) -> None:
    """Set them from a configuration. Raises `DataError` if the cache's folder cannot be used."""
    global _options
    cache: BlockCache | NoCache = NoCache()
    if data.cache_dir is not None:
        try:
            cache = BlockCache(Path(data.cache_dir), int(data.cache_gib * 2**30))
        except OSError as error:
            raise DataError(
                f"data.cache_dir={data.cache_dir}: cannot be written to ({error}). Name a folder on this "
                "node's own disk, or set data.cache_dir=null."
            ) from error
    rate = NoLimit() if data.requests_per_s is None else RequestRate(data.requests_per_s)
    _options = ReadOptions(data.read_timeout_s, cache, rate)
