"""Indexing of one source: its files in parallel, each into a part of its own, then one index of all parts.

Parts lie in `<index>.parts` until the index is complete, so that an interrupted command goes on where it was.
A part is named after all that it depends on; one of a file that has changed since is not taken.
"""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from k25_train.config.basics import is_url
from k25_train.config.data import DataConfig
from k25_train.data.folder import locate
from k25_train.data.format_specs import spec_of
from k25_train.data.formats.index_layout import VERSION, ShardInfo, SourceHeader
from k25_train.data.formats.index_merge import write_index
from k25_train.data.formats.index_prefix import IndexFileError, MissingIndexError
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.open_source import (
    StaleIndexError,
    difference_of,
    infos,
    open_index,
)
from k25_train.data.storage.attempts import describe
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError

Progress = Callable[[int, int, int], None]
"""Called with (files done, files, bytes of the file that was done)."""


def why_not_current(files: SourceFiles, shards: list[ShardInfo], tokenizer: Tokenizer) -> str:
    """Why a source's index has to be made; empty if there is one of these files and this vocabulary."""
    try:
        index = open_index(files, tokenizer, files.data.cache_dir)
    except (MissingIndexError, StaleIndexError, IndexFileError) as error:
        return str(error)
    return _difference(files, index, shards)


def _difference(files: SourceFiles, index: SourceIndex, shards: list[ShardInfo]) -> str:
    indexed = {shard.name: shard for shard in index.shards()}
    listed = {shard.name: shard for shard in shards}
    new = [name for name in listed if name not in indexed]
    if new:
        return f"{len(new)} files are new, {new[0]} is one of them"
    # Files that only media lie in are not listed.
    others = {name for name in indexed if name not in listed}
    try:
        listed |= {shard.name: shard for shard in infos(files, others)}
    except DataError as error:
        return str(error)
    for number, shard in enumerate(index.shards()):
        first, stop = index.items_in(number)
        if first < stop and shard.name in others:
            return f"{shard.name} is no longer one of its files"
    for name, shard in listed.items():
        difference = difference_of(indexed[name], shard)
        if difference:
            return f"{name} {difference}"
    return ""


def index_source(
    name: str, data: DataConfig, tokenizer_path: str, workers: int, progress: Progress, *, force: bool = False
) -> SourceHeader | None:
    """Make the index of one of `data.sources`, unless there is one of its files as they are now.

    Returns what it says, or None where nothing had to be done. Raises DataError, naming the file, for what
    cannot be indexed; files that were done by then are not done again.
    """
    files, tokenizer = SourceFiles(name, data), load_tokenizer(tokenizer_path)
    spec = spec_of(files.config.format)
    shards = spec.list_shards(files)
    is_current = not force and not why_not_current(files, shards, tokenizer)
    local = _local_place(files, data.cache_dir)
    folder = local.with_name(local.name + ".parts")
    if is_current:
        if folder.exists():  # of a command that was killed at its very end
            with _only_one(local):
                shutil.rmtree(folder, ignore_errors=True)
        return None
    with _only_one(local):
        folder.mkdir(exist_ok=True)
        parts = [folder / _part_name(files, shard, tokenizer) for shard in shards]
        if force:
            for part in parts:
                part.unlink(missing_ok=True)
        _index_parts(name, data, tokenizer_path, list(zip(shards, parts, strict=True)), workers, progress)
        # What a command that is killed leaves behind is all in the folder of parts.
        complete = folder / "complete"
        header = write_index(complete, parts)
        os.replace(complete, local)
        if is_url(files.index):
            _upload(local, files.index)
        shutil.rmtree(folder)
    return header


def _index_parts(
    name: str,
    data: DataConfig,
    tokenizer_path: str,
    parts: list[tuple[ShardInfo, Path]],
    workers: int,
    progress: Progress,
) -> None:
    """Index the files whose parts are not there yet."""
    missing = [(shard, part) for shard, part in parts if not part.exists()]
    done = len(parts) - len(missing)
    progress(done, len(parts), 0)
    if workers == 0 or len(missing) < 2:
        for shard, part in missing:
            index_part(name, data, tokenizer_path, shard, part)
            done += 1
            progress(done, len(parts), shard.num_bytes)
        return
    # Not forked: the libraries that decode media start threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), context) as pool:
        jobs = {
            pool.submit(index_part, name, data, tokenizer_path, shard, part): shard for shard, part in missing
        }
        try:
            for job in as_completed(jobs):
                job.result()
                done += 1
                progress(done, len(parts), jobs[job].num_bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def index_part(name: str, data: DataConfig, tokenizer_path: str, shard: ShardInfo, part: Path) -> None:
    """Index one file of a source into `part`, which appears when it is complete."""
    files, tokenizer = SourceFiles(name, data), _tokenizer(tokenizer_path)
    spec = spec_of(files.config.format)
    header = SourceHeader(
        format=files.config.format.value,
        tokenizer_sha256=tokenizer.sha256,
        frame=spec.frame,
        facts={"kinds": files.kinds} if files.kinds else {},
    )
    keeps = {"keeps_keys": spec.keeps_keys, "keeps_kinds": spec.keeps_kinds}
    with IndexWriter(part, header, **keeps) as writer:
        spec.index_shard(files, shard, tokenizer, writer)


_tokenizers: dict[str, Tokenizer] = {}


def _tokenizer(path: str) -> Tokenizer:
    if path not in _tokenizers:
        _tokenizers[path] = load_tokenizer(path)
    return _tokenizers[path]


def _part_name(files: SourceFiles, shard: ShardInfo, tokenizer: Tokenizer) -> str:
    kinds = f"{files.config.format.value} {files.kinds}"
    facts = [VERSION, kinds, tokenizer.sha256, shard.num_bytes, shard.text().decode()]
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]


def _local_place(files: SourceFiles, cache_dir: str | None) -> Path:
    """Where the index is written: its own place or, for one at a URL, a place on this machine."""
    if not is_url(files.index):
        place = Path(files.index)
    else:
        name = hashlib.sha256(files.index.encode()).hexdigest()[:16]
        place = Path(cache_dir or tempfile.gettempdir()) / f"k25-indexing-{os.getuid()}" / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{place.parent}: cannot be made ({error}). Set data.sources.{files.name}.index."
        ) from (error)
    return place


@contextmanager
def _only_one(place: Path) -> Iterator[None]:
    """Hold the lock of an index. Raises DataError if another command has it."""
    path = place.with_name(place.name + ".lock")
    while True:
        try:
            lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error}), so no index can be made next to the data. Name "
                "another place with data.sources.NAME.index."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it removes the file at its end, perhaps after it was opened here.
            if os.fstat(lock).st_nlink:
                yield
                path.unlink(missing_ok=True)
                return
        except BlockingIOError as error:
            raise DataError(f"{place}: another command makes this index. Wait until it has ended.") from error
        finally:
            os.close(lock)


def _upload(local: Path, url: str) -> None:
    fs, place = locate(url, "data.sources.NAME.index")
    try:
        fs.put_file(str(local), place)
    except Exception as error:  # file systems of fsspec raise what their libraries do
        raise DataError(
            f"{url}: the index cannot be written there ({describe(error)}); it is at {local}. Copy it, or "
            "name "
            "another place with data.sources.NAME.index."
        ) from error
    local.unlink()
