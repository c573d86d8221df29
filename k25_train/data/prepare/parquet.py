"""Texts in Parquet files: a column of strings, row group by row group. pyarrow is loaded on first use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from k25_train.data.folder import locate
from k25_train.data.storage.attempts import describe
from k25_train.errors import DataError

ROWS_AT_ONCE = 256
"""Rows that are decoded together; our choice."""


def row_groups(url: str, field: str, id_field: str) -> tuple[int, ...]:
    """Bytes of each row group. Raises DataError if it is no Parquet file with a column of strings `field`."""
    with _opened(url) as file:
        schema = file.schema_arrow
        for name in filter(None, (field, id_field)):
            if schema.get_field_index(name) < 0:
                names = ", ".join(schema.names)
                raise DataError(
                    f"{url}: has no column {name!r}. Its columns are {names}: name one with --field."
                )
        if not _holds_text(schema.field(field).type):
            raise DataError(
                f"{url}: its column {field!r} is {schema.field(field).type}, not strings. Name another "
                "with --field."
            )
        metadata = file.metadata
        return tuple(_group_bytes(metadata.row_group(i)) for i in range(metadata.num_row_groups))


def rows(url: str, groups: range, field: str, id_field: str) -> Iterator[tuple[object, object]]:
    """Text and id of each row of some row groups; the id is None without an `id_field`.

    Raises DataError if the file is damaged.
    """
    columns = [field, id_field] if id_field else [field]
    with _opened(url) as file:
        for batch in file.iter_batches(
            ROWS_AT_ONCE, row_groups=list(groups), columns=columns, use_threads=False
        ):
            texts, ids = batch.column(field), batch.column(id_field) if id_field else None
            for row in range(batch.num_rows):
                yield _value(texts[row]), None if ids is None else _value(ids[row])


def first_row(url: str, group: int) -> int:
    """Number of the first row of a row group, counted from 0."""
    with _opened(url) as file:
        return sum(file.metadata.row_group(i).num_rows for i in range(group))


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    fs, place = locate(url, "INPUT")
    with fs.open(place, mode="rb") as stream:
        try:
            yield pq.ParquetFile(stream, pre_buffer=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{url}: cannot be read as Parquet ({describe(error)}). Restore it, or leave it out."
            ) from error


def _holds_text(kind: Any) -> bool:
    import pyarrow.types as types  # type: ignore[import-untyped]

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )


def _group_bytes(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _value(scalar: Any) -> object:
    """A value as Python has it; bytes of a string that is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
