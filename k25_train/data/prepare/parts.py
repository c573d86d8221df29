"""The part of the result that a unit becomes: its tokens, and a record of them whose presence commits both.

`NNNNNN.tokens` holds the ids one after the other. `NNNNNN.done` holds a line of JSON (`PartReport`), then the
documents' numbers of tokens (int32), then 64 bits of a hash of each document's id if ids are compared. Both
are written under another name first; the record last, so a part without it is made again.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from k25_train.data.prepare.units import Unit

MAX_EXAMPLES = 20
"""Skipped records of a unit that are described; all are counted. Our choice."""
LENGTH_DTYPE = np.dtype("<i4")
HASH_DTYPE = np.dtype("<u8")


@dataclass(slots=True, kw_only=True)
class PartReport:
    """What became of a unit."""

    num_documents: int = 0
    num_tokens: int = 0
    num_records: int = 0
    """Lines, blank ones included, or rows."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of records."""
    examples: list[tuple[int, str, str]] = field(default_factory=list)
    """Number, reason and detail of the first ones skipped."""
    has_hashes: bool = False

    def skip(self, number: int, reason: str, detail: str) -> None:
        """Count a record that is no document."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((number, reason, detail[:200]))

    @property
    def num_skipped(self) -> int:
        """Records that are no documents, blank lines apart."""
        return sum(self.skipped.values())


class Parts:
    """The folder of parts."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not exist."""
        self.folder = folder

    def tokens(self, unit: Unit) -> Path:
        """File of a unit's tokens."""
        return self._path(unit, "tokens")

    def done(self, unit: Unit) -> Path:
        """File whose presence says that a unit is done."""
        return self._path(unit, "done")

    def report(self, unit: Unit) -> PartReport | None:
        """What became of a unit; None if it is not done."""
        try:
            with self.done(unit).open("rb") as file:
                values = json.loads(file.readline())
        except (FileNotFoundError, ValueError):
            return None
        return PartReport(**{**values, "examples": [tuple(each) for each in values["examples"]]})

    def lengths(self, unit: Unit) -> NDArray[np.int32]:
        """Tokens of each document of a unit that is done."""
        return self._columns(unit)[0]

    def hashes(self, unit: Unit) -> NDArray[np.uint64]:
        """Hash of each document's id."""
        return self._columns(unit)[1]

    def _columns(self, unit: Unit) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        with self.done(unit).open("rb") as file:
            values = json.loads(file.readline())
            num = values["num_documents"]
            lengths = np.frombuffer(file.read(num * LENGTH_DTYPE.itemsize), LENGTH_DTYPE)
            return lengths, np.frombuffer(file.read(), HASH_DTYPE)

    def _path(self, unit: Unit, suffix: str) -> Path:
        # A thousand parts in a folder, which every file system lists quickly.
        return self.folder / f"{unit.number // 1000:03d}" / f"{unit.number:06d}.{suffix}"


class PartWriter:
    """Writes a part; used as a context, at whose end without an error it is committed."""

    def __init__(self, parts: Parts, unit: Unit, dtype: np.dtype[np.generic]) -> None:
        self.report = PartReport()
        self._dtype = dtype
        self._tokens, self._done = parts.tokens(unit), parts.done(unit)
        self._scratch = [path.with_name(f"{path.name}.partial") for path in (self._tokens, self._done)]
        self._lengths: list[int] = []
        self._hashes: list[int] = []
        self._tokens.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._scratch[0].open("wb")

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens of the document that `end_document` ends."""
        # `array` reads a list of ints in a third of the time that numpy takes.
        self._file.write(np.frombuffer(array("i", tokens), np.int32).astype(self._dtype).tobytes())

    def tell(self) -> int:
        """Bytes of tokens so far."""
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Take back what was added behind a position."""
        self._file.seek(position)
        self._file.truncate()

    def end_document(self, num_tokens: int, id_: bytes) -> None:
        """Count a document whose tokens have been added."""
        self._lengths.append(num_tokens)
        if id_:
            self._hashes.append(int.from_bytes(hashlib.blake2b(id_, digest_size=8).digest(), "little"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            for path in self._scratch:
                path.unlink(missing_ok=True)

    def _commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._scratch[0], self._tokens)
        self.report.num_documents = len(self._lengths)
        self.report.num_tokens = sum(self._lengths)
        self.report.has_hashes = bool(self._hashes)
        with self._scratch[1].open("wb") as file:
            file.write(json.dumps(asdict(self.report)).encode() + b"\n")
            file.write(np.array(self._lengths, LENGTH_DTYPE).tobytes())
            file.write(np.array(self._hashes, HASH_DTYPE).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._scratch[1], self._done)
