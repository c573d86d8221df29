"""The input files of a corpus, in order: found, recognised by their first bytes, and described."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from k25_train.data.folder import locate
from k25_train.data.prepare.parquet import row_groups
from k25_train.data.storage.attempts import describe
from k25_train.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""Of files that are taken from a folder, each also with a suffix of `CODECS`; others are left alone, among
them `.json`, which this command writes itself."""
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffix -> the compression's name in Arrow."""
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"))
"""First bytes of a compressed file: RFC 1952, RFC 8878, and bzip2 as it writes them."""
PARQUET = "parquet"
LINES = "lines"
_REFUSED = {
    b"\xfd7zXZ": "is compressed by xz, which is not read: compress it by zstd or gzip",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"\xff\xfe": "is UTF-16, and JSON lines are UTF-8: convert it with iconv",
    b"\xfe\xff": "is UTF-16, and JSON lines are UTF-8: convert it with iconv",
    b"MMIDIDX": "is an index of tokens already: give its prefix to the training as format=indexed",
}
_HEAD_BYTES = 256
_GLOB = frozenset("*?[")
_NUM_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One input file, as it was when it was planned."""

    url: str
    """Absolute path or URL."""
    kind: str
    """`LINES` or `PARQUET`."""
    codec: str
    """Compression of lines by its name in Arrow; empty for none."""
    num_bytes: int
    version: str
    """What else tells its content from another: an object's tag, or the time of its last change."""
    group_bytes: tuple[int, ...] = ()
    """Of Parquet, the size of each row group."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "group_bytes": list(self.group_bytes)}


def find_inputs(inputs: Sequence[str], field: str, id_field: str) -> list[InputFile]:
    """The files that the arguments name: files, folders (with all below them), globs, or URLs of these.

    Order is that of the arguments, and by name within one.

    Raises DataError for a file that is not there, is of no kind that is read, lacks the field, or is named
    twice.
    """
    urls = [url for each in inputs for url in _expand(each)]
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise DataError(f"{url}: is named twice, so its documents would be. Name it once.")
        seen.add(url)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return list(threads.map(lambda url: _described(url, field, id_field), urls))


def current_version(url: str) -> tuple[int, str]:
    """Size and version of a file now. Raises DataError if it cannot be asked."""
    fs, place = locate(url, "INPUT")
    try:
        fs.invalidate_cache()
        found = fs.info(place)
    except Exception as error:  # file systems of fsspec raise what their libraries do
        raise _unreadable(url, error) from error
    if found.get("size") is None:
        raise DataError(f"{url}: its server does not tell its size. Copy it to a local folder first.")
    names = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
    return int(found["size"]), next((str(found[name]) for name in names if found.get(name)), "")


def _expand(text: str) -> Iterator[str]:
    fs, place = locate(text, "INPUT")
    try:
        if fs.isfile(place):
            yield place if _is_local(fs) else text
            return
        if fs.isdir(place):
            found = [path for path in fs.find(place) if _is_corpus(path[len(place) :])]
            nothing = f"no {', '.join(SUFFIXES)} (or with {', '.join(CODECS)}) is in this folder"
        elif _GLOB & set(text):
            found = [path for path in fs.glob(place) if fs.isfile(path)]
            nothing = "no file matches"
        else:
            found, nothing = [], "no such file or folder"
    except Exception as error:  # file systems of fsspec raise what their libraries do
        raise _unreadable(text, error) from error
    if not found:
        raise DataError(f"{text}: {nothing}. Correct the path.")
    yield from (path if _is_local(fs) else str(fs.unstrip_protocol(path)) for path in sorted(found))


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def _is_corpus(path: str) -> bool:
    """Whether a file below a folder is part of a corpus; what is hidden, or Spark's `_SUCCESS`, is not."""
    if any(part.startswith((".", "_")) for part in path.split("/")):
        return False
    for suffix in CODECS:
        path = path.removesuffix(suffix)
    return path.endswith(SUFFIXES)


def _described(url: str, field: str, id_field: str) -> InputFile:
    num_bytes, version = current_version(url)
    fs, place = locate(url, "INPUT")
    try:
        head = bytes(fs.cat_file(place, start=0, end=min(num_bytes, _HEAD_BYTES))) if num_bytes else b""
    except Exception as error:  # as above
        raise _unreadable(url, error) from error
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise DataError(f"{url}: {what}.")
    if head.startswith(b"PAR1"):
        groups = row_groups(url, field, id_field)
        return InputFile(
            url=url, kind=PARQUET, codec="", num_bytes=num_bytes, version=version, group_bytes=groups
        )
    codec = next((codec for magic, codec in _MAGIC if head.startswith(magic)), "")
    _check_lines(url, head, codec)
    return InputFile(url=url, kind=LINES, codec=codec, num_bytes=num_bytes, version=version)


def _check_lines(url: str, head: bytes, codec: str) -> None:
    if url.endswith(".parquet") and head:
        raise DataError(f"{url}: does not begin as Parquet does; it is damaged or has the wrong name.")
    if not codec and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(
            f"{url}: is one JSON array; JSON lines have an object in each line. Convert it: "
            f"`jq -c '.[]' FILE > FILE.jsonl`."
        )


def _unreadable(url: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{url}: no such file or folder. Correct the path.")
    return DataError(f"{url}: cannot be read ({describe(error)}). Correct its path or permissions.")


def total_bytes(files: Iterable[InputFile]) -> int:
    """Size of all files."""
    return sum(file.num_bytes for file in files)
