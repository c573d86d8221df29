"""Rows of a `metrics.jsonl` while it is appended to, here or elsewhere, by asking for its size.

```
 ┌──────────── read before ───────────┬── new ──┬─ half a line ─┐
                              [ mark ]▲         ▲ kept until the rest is there
                    the last bytes    offset
```
Whoever resumes a run cuts its rows off and writes others: if the mark is not where it was, or the file is
shorter, it is read from its beginning.
"""

from __future__ import annotations

from collections import deque

from k25_train.metrics.watch.files import File
from k25_train.run_folder.rows_file import Row, parse

MARK_BYTES = 256
"""Last bytes that were read, by which the file is known again: less than a row of a step."""
MOST_ROWS = 100_000
"""Latest rows that are kept."""
MOST_BYTES = 256 << 20
"""What is read of a longer file at first: its end."""


class Followed:
    """The rows of one file, as far as it was read."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.rows: deque[Row] = deque(maxlen=MOST_ROWS)
        self.num_damaged = 0
        """Lines that are no rows."""
        self.exists = False
        """Whether the file was there when it was looked for last."""
        self._begin(0)

    def _begin(self, offset: int) -> None:
        self.rows.clear()
        self.num_damaged = 0
        self._offset = offset
        self._mark = b""
        self._half = b""
        self._is_cut = offset > 0

    def poll(self) -> bool:
        """Read what was appended; returns whether there is anything new, or nothing any more.

        Raises `MachineError` if the file cannot be read now; it can be asked again.
        """
        size = self.file.num_bytes()
        if size is None:
            was_there, self.exists = self.exists, False
            if was_there:
                self._begin(0)
            return was_there
        is_other, self.exists = not self.exists or size < self._offset, True
        if size < self._offset:
            self._begin(0)
        if not self._mark:
            self._begin(max(0, size - MOST_BYTES))
        elif size == self._offset and self._is_known():
            return is_other
        read = self.file.read(self._offset - len(self._mark), size)
        if not read.startswith(self._mark):
            # Another file under this name.
            self._begin(max(0, size - MOST_BYTES))
            read = self.file.read(self._offset, size)
        return self._take(read) or is_other

    def _is_known(self) -> bool:
        start = self._offset - len(self._mark)
        return self.file.read(start, self._offset) == self._mark

    def _take(self, read: bytes) -> bool:
        """Take bytes that begin with the mark."""
        new = read[len(self._mark) :]
        self._offset += len(new)
        self._mark = read[-MARK_BYTES:]
        *lines, self._half = (self._half + new).split(b"\n")
        for line in lines:
            row = parse(line)
            if row is not None:
                self.rows.append(row)
            elif line and not self._is_cut:
                self.num_damaged += 1
            self._is_cut = False
        return bool(new)
