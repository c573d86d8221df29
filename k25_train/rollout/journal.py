"""The journal of a run's rollouts: whatever ends the run, no token that was acknowledged is lost.

    rollouts/journal/000000.log   base admitted segment segment judged … consumed
                     000001.log   base …                                   new records go to the last one

Records are appended by a thread, together with all others that come within `COMMIT_S`, and are acknowledged
when they are on disk (`flush`). What a kill has cut short at the end is dropped when the journal is opened.
A file goes once every group in it was consumed by a step that all kept checkpoints have behind them.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

from k25_train.errors import RolloutError
from k25_train.rollout.journal_state import JournalState, base, every_step
from k25_train.rollout.records import Record, is_cut_short, records_in

COMMIT_S = 0.05
"""Longest time until a record is on disk."""
FILE_BYTES = 64 * 2**20
"""A file is followed by another from this size on; each is read whole when the journal is opened."""


class Journal:
    """One writer's journal, used by one thread."""

    def __init__(
        self,
        folder: Path,
        *,
        has_data: Callable[[int], bool] = every_step,
        notice: Callable[[str], None] = lambda _: None,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        """Read what there is, cut a torn end off, and go on behind it.

        Args:
            folder: of the journal alone; made if it is not there.
            has_data: whether the data of a step are on disk; one that lost them has consumed nothing.
            notice: told what was cut off.

        Raises `RolloutError` for a file that is damaged before its end, or cannot be read.
        """
        self._folder = folder
        self._file_bytes = file_bytes
        self.state = JournalState(has_data)
        """What the records amount to, those included that are not on disk yet."""
        self._highest: dict[Path, int] = {}
        """File -> highest group of its records."""
        self._waiting: list[bytes | Path] = []
        self._num_appended = self._num_durable = 0
        self._changed = threading.Condition()
        self._is_urgent = self._is_closed = False
        self._failure: Exception | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path, self._size = self._read_all(notice)
        except OSError as error:
            raise RolloutError(f"{folder}: the journal cannot be read ({error})") from error
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()
        if not self._size:
            self._put(base(self.state.num_admitted))

    @property
    def num_files(self) -> int:
        """Files that there are."""
        return len(self._highest)

    def append(self, record: Record) -> None:
        """Take a record in; it is on disk after `COMMIT_S`, or once `flush` returns.

        Raises `RolloutError` for one that cannot follow those before it, behind `close`, and if earlier ones
        could not be written.
        """
        self._check()
        if self._is_closed:
            raise RolloutError(f"{self._folder}: the journal is closed, and takes no more records in")
        self.state.apply(record)
        self._put(record)
        if self._size >= self._file_bytes:
            self._path, self._size = self._named(_number(self._path) + 1), 0
            with self._changed:
                self._waiting.append(self._path)
            self._put(base(self.state.num_admitted))

    def flush(self) -> None:
        """Return once everything that was appended is on disk. Raises `RolloutError` if it cannot be."""
        with self._changed:
            wanted, self._is_urgent = self._num_appended, True
            self._changed.notify_all()
            while self._num_durable < wanted and self._failure is None:
                self._changed.wait()
        self._check()

    def prune(self, oldest_kept: int) -> list[Path]:
        """Delete files of groups that were consumed by steps up to `oldest_kept`, the step of the oldest
        checkpoint that one may go back to; returns which."""
        below = self.state.settled_below(oldest_kept)
        gone = []
        for path in sorted(self._highest):
            # In order: what stays has to begin behind what went.
            if path == self._path or self._highest[path] >= below:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            del self._highest[path]
            gone.append(path)
        self.state.forget(oldest_kept)
        return gone

    def close(self) -> None:
        """Write what is left, and end the thread."""
        with self._changed:
            self._is_closed = self._is_urgent = True
            self._changed.notify_all()
        self._thread.join()

    def _put(self, record: Record) -> None:
        data = record.to_bytes()
        self._note(self._path, record)
        self._size += len(data)
        with self._changed:
            self._waiting.append(data)
            self._num_appended += 1
            self._changed.notify_all()

    def _note(self, path: Path, record: Record) -> None:
        highest = self._highest.setdefault(path, -1)
        self._highest[path] = max(highest, record.header.get("group", -1))

    def _check(self) -> None:
        if self._failure is not None:
            raise RolloutError(
                f"{self._folder}: the journal cannot be written ({self._failure}); what was acknowledged is "
                "there: make room, and start again"
            ) from self._failure

    def _named(self, number: int) -> Path:
        return self._folder / f"{number:06}.log"

    # Reading

    def _read_all(self, notice: Callable[[str], None]) -> tuple[Path, int]:
        """Take in every file; the last one, and its length."""
        paths = journal_files(self._folder)
        for path in paths:
            data = path.read_bytes()
            whole = self._take_in(path, data)
            if whole == len(data):
                continue
            if path != paths[-1] or not is_cut_short(data, whole):
                raise RolloutError(
                    f"{path}: damaged at byte {whole} of {len(data)}; records follow it, so it was not cut "
                    "short by a kill. Bring the file back, or start in another run.dir"
                )
            os.truncate(path, whole)
            notice(f"{path}: {len(data) - whole} bytes at its end were cut short by a kill, and are dropped")
        return (paths[-1], paths[-1].stat().st_size) if paths else (self._named(0), 0)

    def _take_in(self, path: Path, data: bytes) -> int:
        """Take in the records of a file; the byte behind the last whole one."""
        stop = 0
        for record, end in records_in(data):
            try:
                self.state.apply(record)
            except RolloutError as error:
                raise RolloutError(f"{path}, byte {stop}: {error}") from error
            self._note(path, record)
            stop = end
        return stop

    # The thread that writes

    def _write_all(self) -> None:
        path, file = self._path, None
        try:
            file = _opened(path)
            while batch := self._next_batch():
                for entry in batch:
                    if isinstance(entry, Path):
                        _finish(file)
                        file.close()
                        file = _opened(entry)
                    else:
                        file.write(entry)
                _finish(file)
                with self._changed:
                    self._num_durable += sum(isinstance(entry, bytes) for entry in batch)
                    self._changed.notify_all()
        except Exception as error:
            # Whatever it is: who waits for records to be on disk must not wait for ever.
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _next_batch(self) -> Sequence[bytes | Path]:
        """What came within the time of a commit; nothing once the journal is closed."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if not self._is_urgent:
                self._changed.wait_for(lambda: self._is_urgent, COMMIT_S)
            batch, self._waiting, self._is_urgent = self._waiting, [], self._is_closed
            return batch


def journal_files(folder: Path) -> list[Path]:
    """The files of a journal, oldest first."""
    return sorted(path for path in folder.glob("*.log") if path.stem.isdigit())


def read_state(folder: Path, *, has_data: Callable[[int], bool] = every_step) -> JournalState:
    """What a journal amounts to, without a change to it: for those who look at a run. Raises as `Journal`."""
    state = JournalState(has_data)
    for path in journal_files(folder):
        for record, _ in records_in(path.read_bytes()):
            state.apply(record)
    return state


def _number(path: Path) -> int:
    return int(path.stem)


def _opened(path: Path) -> BufferedWriter:
    """A file to append to, which a power cut does not take out of its folder."""
    file = path.open("ab")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return file


def _finish(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
