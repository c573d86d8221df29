"""All that can be wrong with a checkpoint, found by reading all of it; nothing ends at the first fault."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from k25_train.checkpoint import folders
from k25_train.checkpoint.commands.statistics import statistics_of
from k25_train.checkpoint.commands.streaming import Job, in_threads, jobs, read
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.data_state import read_data_state
from k25_train.checkpoint.files.access import opened, read_bytes
from k25_train.checkpoint.files.damage import damage
from k25_train.checkpoint.files.header import Header, digest_of
from k25_train.checkpoint.files.index import check_complete, combine, index_of
from k25_train.checkpoint.files.reader import read_headers
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.integrity import changed_files
from k25_train.checkpoint.manifest import FileEntry, Manifest, read_manifest
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError, ConfigError

Advance = Callable[[int], None]


@dataclass(slots=True)
class Check:
    """What was found out about one checkpoint."""

    folder: Place
    manifest: Manifest | None = None
    """None if it cannot be read."""
    num_tensors: int = 0
    num_bytes: int = 0
    """That were read."""
    faults: list[str] = field(default_factory=list)
    """What is wrong, a line each that names file or tensor."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is to be known."""


def check(folder: Place, num_threads: int, advance: Advance, *, reads_content: bool = True) -> Check:
    """Look at everything.

    Args:
        folder: of a checkpoint.
        num_threads: pieces that are read at a time.
        advance: told how many bytes were read.
        reads_content: whether tensors are read; else names, sizes, headers and small files alone.
    """
    found = Check(folder)
    try:
        found.manifest = manifest = read_manifest(folder)
    except CheckpointError as error:
        found.faults.append(str(error))
        return found
    whole = _whole_files(found, manifest)
    _small_files(found, manifest, whole)
    stored = _opened(found, manifest, whole)
    if not manifest.has_checksums:
        found.notes.append("was saved without checksums: a byte that changed may go unnoticed")
    if stored is not None:
        found.num_tensors = len(stored.tensors)
        if reads_content:
            _content(found, stored, num_threads, advance)
    return found


def _whole_files(found: Check, manifest: Manifest) -> dict[str, FileEntry]:
    """The files that are there in their sizes; the others are faults."""
    folder, sizes = found.folder, storage_of(found.folder).sizes(found.folder, manifest.files)
    if folders.has_step_name(folder) and manifest.step != folders.step_of(folder):
        found.faults.append(
            f"{folder}: holds step {manifest.step}: it was renamed, or its files were replaced"
        )
    whole = {}
    for name, entry in manifest.files.items():
        size = sizes.get(name)
        if size == entry.num_bytes:
            whole[name] = entry
        else:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {entry.num_bytes:,}"
            found.faults.append(f"{folder / name}: {what}")
    return whole


def _small_files(found: Check, manifest: Manifest, whole: Mapping[str, FileEntry]) -> None:
    """Files that are hashed as a whole, and what those of text say."""
    folder = found.folder
    found.faults += changed_files(folder, whole, 0, 1)
    found.num_bytes += sum(entry.num_bytes for entry in whole.values() if entry.sha256)
    for name, reader in ((folders.CONFIG, saved_config), (folders.DATA_STATE, None)):
        if name in whole:
            try:
                if reader is None:
                    read_data_state(folder)
                else:
                    reader(folder / name)
            except (CheckpointError, ConfigError) as error:
                found.faults.append(str(error))
    if folders.CONFIG not in manifest.files:
        found.notes.append(f"has no {folders.CONFIG}")


def _opened(found: Check, manifest: Manifest, whole: Mapping[str, FileEntry]) -> StoredCheckpoint | None:
    """All tensors of which something can be read; None if that is none."""
    if manifest.version < 3:
        # One list of tensors for all files, which is among those that were hashed.
        try:
            return None if found.faults else StoredCheckpoint.open(found.folder)
        except CheckpointError as error:
            found.faults.append(plain(error, found.folder))
            return None
    indexes = []
    for name in manifest.part_files:
        if name in whole:
            try:
                headers = read_headers(found.folder, {name: whole[name]})
                indexes.append(index_of(headers))
                check_padding(found.folder, name, headers[name], whole[name])
            except CheckpointError as error:
                found.faults.append(plain(error, found.folder))
    try:
        index = combine(indexes)
        check_complete(index)
    except CheckpointError as error:
        found.faults.append(plain(error, found.folder))
    return StoredCheckpoint(found.folder, manifest, index) if indexes else None


def check_padding(folder: Place, name: str, header: Header, entry: FileEntry) -> None:
    """Compare what lies between parts, which no load reads. Raises `DamagedCheckpointError`."""
    with damage(folder, name), opened(folder / name) as file:
        table = read_bytes(file, header.table_offset, header.table_bytes)
        if digest_of(table) != entry.table_xxh3:
            raise ValueError("its checksums are not as they were written")
        block = 0
        for each in header.entries:
            if each.part is None and each.num_bytes:
                data = read_bytes(file, header.num_bytes + each.offset, each.num_bytes)
                expected = int.from_bytes(table[8 * block : 8 * block + 8], "little")
                if int(digest_of(data), 16) != expected:
                    raise ValueError("bytes between its parts are not as they were written")
            block += each.num_blocks


def _content(found: Check, stored: StoredCheckpoint, num_threads: int, advance: Advance) -> None:
    """Read every part: its blocks are compared with their checksums, its values looked at."""
    not_finite = Counter[str]()

    def look(job: Job) -> list[Looked]:
        return list(_as_far_as_possible(job, stored))

    for _, looked in in_threads(look, jobs(stored.parts), num_threads):
        for each in looked:
            advance(each.num_bytes)
            found.num_bytes += each.num_bytes
            not_finite[each.name] += each.num_not_finite
            found.faults += each.faults
    for name, count in not_finite.items():
        if count:
            numel = stored.tensors[name].numel
            found.faults.append(f"{name}: {count:,} of {numel:,} elements are not finite")


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen of a range of a tensor."""

    name: str
    num_bytes: int
    num_not_finite: int
    faults: tuple[str, ...] = ()
    """Why it cannot be read."""


def _as_far_as_possible(job: Job, stored: StoredCheckpoint) -> Iterator[Looked]:
    """Look at each range, at those also that share a read with one that cannot be read."""
    try:
        tensors = read(stored, job)
    except CheckpointError as error:
        if len(job.which) == 1:
            yield Looked(job.names[0], 0, 0, (plain(error, stored.folder),))
        else:
            for alone in job.alone():
                yield from _as_far_as_possible(alone, stored)
        return
    for name, tensor in zip(job.names, tensors, strict=True):
        yield Looked(name, tensor.nbytes, statistics_of(tensor).num_not_finite)


def plain(error: Exception, folder: Place) -> str:
    """What an error says, without a remedy of its own."""
    return str(error).partition("; restore it from a copy")[0]
