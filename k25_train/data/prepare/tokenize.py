"""A unit of the input to a part of the result: what a worker does."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from k25_train.data.long_runs import PanicErrors
from k25_train.data.prepare.documents import NOT_ENCODED, Record, records
from k25_train.data.prepare.inputs import InputFile, current_version
from k25_train.data.prepare.lines import ReadError
from k25_train.data.prepare.parts import PartReport, Parts, PartWriter
from k25_train.data.prepare.units import Unit
from k25_train.data.storage.attempts import RETRY_DELAYS_S
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 2**18
"""Text that is encoded in one call: enough for calls to cost nothing, little enough for memory."""
BATCH_DOCUMENTS = 1024
LONG_CHARACTERS = 2**20
"""Texts from here on are encoded part by part, since its tokens take some hundred times its memory."""
REPORT_S = 0.5
"""Seconds between two signs of progress."""

Progress = Callable[[int, int], None]
"""Called with bytes of input and tokens of the unit so far."""


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The type of token ids that megatron-core 0.19.2 has for a vocabulary (`DType.optimal_dtype`)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How texts become tokens, the same for all units."""

    tokenizer: Tokenizer
    field: str
    id_field: str
    """Field by which documents are told apart; empty for none."""
    append_eod: bool

    def run(self, file: InputFile, unit: Unit, parts: Parts, progress: Progress) -> PartReport:
        """Make a unit's part, again and again for up to a minute while the file system fails.

        Raises DataError if the input is damaged, has changed, or cannot be read; OSError if the part cannot
        be written.
        """
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                _check_unchanged(file)
                return self._attempt(file, unit, parts, progress)
            except ReadError as error:
                if delay_s is None:
                    raise DataError(
                        f"{error}, after {len(RETRY_DELAYS_S) + 1} attempts. The same command goes on from "
                        "here."
                    ) from error
                logger.warning("%s; trying again in %g s", error, delay_s)
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, file: InputFile, unit: Unit, parts: Parts, progress: Progress) -> PartReport:
        dtype = token_dtype(self.tokenizer.vocab_size)
        with PartWriter(parts, unit, dtype) as part:
            batch = _Batch(self, part)
            told_s = time.monotonic()
            for record in records(file, unit, self.field, self.id_field):
                part.report.num_records += 1
                if record.reason:
                    part.report.skip(record.number, record.reason, record.detail)
                elif record.text:
                    batch.add(record)
                if (now_s := time.monotonic()) - told_s >= REPORT_S:
                    told_s = now_s
                    progress(record.done_bytes, batch.num_tokens)
            batch.flush()
        return part.report


class _Batch:
    """Collects documents and encodes them together, in order."""

    def __init__(self, how: Tokenization, part: PartWriter) -> None:
        self._how = how
        self._part = part
        self._end = [how.tokenizer.eos] if how.append_eod else []
        self._records: list[Record] = []
        self._characters = 0
        self.num_tokens = 0

    def add(self, record: Record) -> None:
        """Add a document."""
        if len(record.text) >= LONG_CHARACTERS:
            self.flush()
            self._add_long(record)
            return
        self._records.append(record)
        self._characters += len(record.text)
        if self._characters >= BATCH_CHARACTERS or len(self._records) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Encode what has been collected."""
        if not self._records:
            return
        try:
            encoded: list[list[int] | None] = [*self._encode([record.text for record in self._records])]
        except RuntimeError:
            encoded = [self._encode_alone(record) for record in self._records]
        tokens: list[int] = []
        for record, ids in zip(self._records, encoded, strict=True):
            if ids is not None:
                tokens += ids
                tokens += self._end
                self._end_document(record, len(ids) + len(self._end))
        self._part.add(tokens)
        self._records, self._characters = [], 0

    def _add_long(self, record: Record) -> None:
        """Encode a long document, a few parts at a time; if one fails, all of it is taken back."""
        with ExitStack() as undo:
            position = self._part.tell()
            undo.callback(self._part.truncate, position)
            num_tokens = 0
            try:
                for parts in _groups(self._how.tokenizer.parts(record.text)):
                    tokens = [token for ids in self._encode(parts) for token in ids]
                    num_tokens += len(tokens)
                    self._part.add(tokens)
            except RuntimeError as error:
                self._part.report.skip(record.number, NOT_ENCODED, str(error))
                return
            undo.pop_all()
        self._part.add(self._end)
        self._end_document(record, num_tokens + len(self._end))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        with PanicErrors():
            return self._how.tokenizer.encode_batch(texts)

    def _encode_alone(self, record: Record) -> list[int] | None:
        try:
            return self._encode([record.text])[0]
        except RuntimeError as error:
            self._part.report.skip(record.number, NOT_ENCODED, str(error))
            return None

    def _end_document(self, record: Record, num_tokens: int) -> None:
        self._part.end_document(num_tokens, record.id)
        self._part.report.text_bytes += len(record.text.encode())
        self.num_tokens += num_tokens


def _groups(parts: list[str]) -> list[list[str]]:
    """Consecutive parts in groups of about `BATCH_CHARACTERS`."""
    groups: list[list[str]] = [[]]
    size = 0
    for part in parts:
        if size >= BATCH_CHARACTERS:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += len(part)
    return groups


def _check_unchanged(file: InputFile) -> None:
    found = current_version(file.url)
    if found != (file.num_bytes, file.version):
        raise DataError(
            f"{file.url}: has changed since this command began on it ({file.num_bytes:,} bytes then, "
            f"{found[0]:,} now). Leave inputs as they are until it ends; start over with --restart."
        )
