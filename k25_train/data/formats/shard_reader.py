"""Reading of shards at random, by offset."""

import json

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from k25_train.data.formats.records import SampleRecord
from k25_train.errors import DataError


class ShardReader:
    """Ranged reads from the shards of one directory.

    Stateless between calls (every read opens, seeks and closes), hence safe across threads and forks; on an
    object store each read is one ranged request.
    """

    def __init__(self, directory: str) -> None:
        """`directory` is a local path or any fsspec URL."""
        self.directory = directory
        self._fs, self._root = url_to_fs(directory)

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of `shard` from `offset`. Raises DataError if the shard ends before."""
        data = self._fs.cat_file(f"{self._root}/{shard}", start=offset, end=offset + num_bytes)
        if len(data) != num_bytes:
            raise DataError(
                f"{self.directory}/{shard}: bytes {offset} to {offset + num_bytes} were asked for and "
                f"{len(data)} are there; the shard was cut short while in use. Copy or build it again."
            )
        return data

    def read_texts(self, record: SampleRecord) -> tuple[str, ...]:
        """The words of a sample's segments, by position; an empty string for a media segment.

        Raises DataError if the `.json` member is not what the index says is there.
        """
        data = self.read(record.shard, record.offset, record.num_bytes)
        try:
            texts = tuple(segment.get("text", "") for segment in json.loads(data)["segments"])
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{self.directory}/{record.shard}, sample {record.key}: no sample JSON at byte "
                f"{record.offset} ({error!r}); shard and index do not belong together. Run "
                "`python -m k25_train.data build` again."
            ) from error
        if len(texts) != len(record.segments):
            raise DataError(
                f"{self.directory}/{record.shard}, sample {record.key}: has {len(texts)} segments, the index "
                f"says {len(record.segments)}. Build the shard set again."
            )
        return texts

    def shard_bytes(self, shard: str) -> int:
        """Size of a shard. Raises DataError if it does not exist."""
        try:
            return int(self._fs.size(f"{self._root}/{shard}"))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.directory}/{shard}: no such shard, though dataset.json lists it."
            ) from error
