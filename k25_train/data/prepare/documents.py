"""Documents of a unit in order, and why a record is none."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from k25_train.data.formats.sample_json import surrogate_in
from k25_train.data.prepare.inputs import PARQUET, InputFile
from k25_train.data.prepare.lines import MAX_LINE_BYTES, ReadError, lines
from k25_train.data.prepare.parquet import first_row, rows
from k25_train.data.prepare.units import Unit
from k25_train.data.storage.attempts import describe
from k25_train.errors import DataError

TOO_LONG = "too long"
CUT_SHORT = "last line cut short"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NO_OBJECT = "no JSON object"
NO_FIELD = "field missing"
NO_STRING = "field is no string"
EMPTY = "empty text"
SURROGATE = "half of a surrogate pair"
NO_ID = "no id"
NOT_ENCODED = "not encoded"
DUPLICATE = "duplicate id"


class Record(NamedTuple):
    """A line or row: a document, or the reason why it is none."""

    number: int
    """Of its line, from 1 within its unit; of its row, from 0 within its file."""
    text: str
    id: bytes
    """Its id as bytes; empty where none is asked for."""
    reason: str
    """Why it is skipped, as one of the words above; empty for a document."""
    detail: str
    done_bytes: int
    """How much of the unit has been read."""


class _SkipError(Exception):
    """A record is no document: reason and detail."""


def records(file: InputFile, unit: Unit, field: str, id_field: str) -> Iterator[Record]:
    """Every record of a unit; blank lines are none.

    Raises:
        DataError: the file is damaged.
        ReadError: the file system failed.
    """
    if file.kind == PARQUET:
        yield from _of_rows(file, unit, field, id_field)
    else:
        yield from _of_lines(file, unit, field, id_field)


def _of_lines(file: InputFile, unit: Unit, field: str, id_field: str) -> Iterator[Record]:
    for number, line in enumerate(lines(file, unit), start=1):
        # A byte-order mark is no part of the first line.
        data = line.data
        if number == 1 and unit.start == 0 and data is not None:
            data = data.removeprefix(b"\xef\xbb\xbf")
        done = unit.num_bytes // 2 if file.codec else min(line.end, unit.num_bytes)
        if data is not None and not data.strip():
            yield Record(number, "", b"", "", "", done)
            continue
        try:
            text, id_ = _parsed(data, field, id_field)
        except _SkipError as skip:
            reason, detail = skip.args
            if line.is_cut and reason in (NOT_JSON, NOT_UTF8):
                reason = CUT_SHORT
            yield Record(number, "", b"", reason, detail, done)
        else:
            yield Record(number, text, id_, "", "", done)


def _parsed(data: bytes | None, field: str, id_field: str) -> tuple[str, bytes]:
    if data is None:
        raise _SkipError(TOO_LONG, f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        content = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise _SkipError(NOT_UTF8, f"byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise _SkipError(NOT_JSON, str(error) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _SkipError(NO_OBJECT, f"a {type(content).__name__}")
    for name in filter(None, (field, id_field)):
        if name not in content:
            reason = NO_FIELD if name == field else NO_ID
            raise _SkipError(
                reason, f"{name!r} is none of {', '.join(map(repr, list(content)[:8])) or 'no fields'}"
            )
    return _checked(content[field]), _id(content[id_field]) if id_field else b""


def _of_rows(file: InputFile, unit: Unit, field: str, id_field: str) -> Iterator[Record]:
    try:
        first = first_row(file.url, unit.start)
        for number, (value, id_) in enumerate(
            rows(file.url, range(unit.start, unit.stop), field, id_field), start=first
        ):
            try:
                text, found = _checked(value), _id(id_) if id_field else b""
            except _SkipError as skip:
                reason, detail = skip.args
                yield Record(number, "", b"", reason, detail, 0)
            else:
                yield Record(number, text, found, "", "", 0)
    except DataError:
        raise
    except OSError as error:
        raise _damaged_or_unreadable(file, error) from error


def _damaged_or_unreadable(file: InputFile, error: OSError) -> Exception:
    # Arrow raises OSError without a number for what is wrong within a file.
    if error.errno is None:
        return DataError(f"{file.url}: is damaged ({describe(error)}). Restore it, or leave it out.")
    return ReadError(f"{file.url}: cannot be read ({describe(error)})")


def _checked(value: object) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise _SkipError(NOT_UTF8, f"byte {error.start} of the text") from error
    if not isinstance(value, str):
        raise _SkipError(NO_STRING, "a null" if value is None else f"a {type(value).__name__}")
    if not value:
        raise _SkipError(EMPTY, "")
    defect = surrogate_in(value)
    if defect is not None:
        raise _SkipError(SURROGATE, defect)
    if len(value) > MAX_LINE_BYTES:
        raise _SkipError(TOO_LONG, f"the text has more than {MAX_LINE_BYTES >> 20} Mi characters")
    return value


def _id(value: object) -> bytes:
    if isinstance(value, str) and value:
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, int) and not isinstance(value, bool):
        return b"i%d" % value
    raise _SkipError(NO_ID, f"its id is {value!r:.40}, neither a string nor a number")
