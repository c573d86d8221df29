"""All files of a source, in parallel, and names that several of its samples have."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceFormat
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.open_source import Source, open_source
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.verify.shard_faults import ShardCheck, check_shard
from k25_train.data.verify.twins import Twins

Report = Callable[[int, int], None]
"""Called with (files done, files)."""


@dataclass(slots=True)
class SourceCheck:
    """What came of a source."""

    source: str
    format: str
    num_shards: int = 0
    num_items: int = 0
    num_media: int = 0
    num_bytes: int = 0
    """Read of it."""
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What may well be meant."""


def verify_source(
    name: str, data: DataConfig, tokenizer_path: str, workers: int, report: Report
) -> SourceCheck:
    """Read all of one of `data.sources`, with `workers` processes (0: in this one).

    Raises DataError, naming file and remedy, where it has no index that is of this vocabulary.
    """
    source = data.sources[name]
    found = SourceCheck(name, source.format.value)
    if source.format is SourceFormat.shards:
        done = count(1)
        found.faults = verify_dataset(data.path_of(source), lambda line: report(next(done), 0))
        return found
    index = _open(name, data, tokenizer_path).index
    found.num_shards = index.header.num_shards
    checks: dict[int, ShardCheck] = {}
    for number, check in _checks(name, data, tokenizer_path, index.header.num_shards, workers):
        checks[number] = check
        report(len(checks), found.num_shards)
    for number in range(found.num_shards):
        check = checks[number]
        found.num_items += check.num_items
        found.num_media += check.num_media
        found.num_bytes += check.num_bytes
        found.faults += map(str, check.faults)
    if "key_end" in index.columns:
        ordered = [checks[number] for number in range(found.num_shards)]
        twins = Twins(name, index, ordered)
        found.faults += map(str, twins.faults())
        found.warnings += twins.warnings()
    return found


def _checks(
    name: str, data: DataConfig, tokenizer_path: str, num_shards: int, workers: int
) -> Iterator[tuple[int, ShardCheck]]:
    if workers == 0 or num_shards < 2:
        for number in range(num_shards):
            yield number, _check(name, data, tokenizer_path, number)
        return
    # Not forked: the libraries that decode media start threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, num_shards), context) as pool:
        jobs = {
            pool.submit(_check, name, data, tokenizer_path, number): number for number in range(num_shards)
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check(name: str, data: DataConfig, tokenizer_path: str, number: int) -> ShardCheck:
    source = _opened.get((name, tokenizer_path)) or _open(name, data, tokenizer_path)
    _opened[name, tokenizer_path] = source
    return check_shard(name, SourceFiles(name, data), source.index, source.reader, number)


_opened: dict[tuple[str, str], Source] = {}
"""Sources that a worker has opened."""


def _open(name: str, data: DataConfig, tokenizer_path: str) -> Source:
    # Files that differ from their index are faults like others, so opening does not look at them.
    return open_source(name, data, _tokenizer(tokenizer_path), checks_shards=False)


_tokenizer = lru_cache(load_tokenizer)
