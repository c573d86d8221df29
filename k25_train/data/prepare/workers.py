"""Tasks on worker processes, each given the next when it is done; all end with this process.

Workers are forked (`child_process.py`), so start the pool before any thread. Without any, or where there is
no fork, tasks run in this process.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pipe, connection
from multiprocessing.connection import Connection
from typing import Any

from k25_train.data.child_process import fork
from k25_train.errors import CheckpointError, DataError, MachineError
from k25_train.escapes import named

Report = Callable[[Any], None]
Work = Callable[[Any, Report], Any]
"""Called with a task and a function that reports progress; returns its result. All is picklable."""
IDLE_S = 0.5
"""Seconds after which waiting is interrupted, so that whoever iterates can show the time."""

_KINDS: dict[str, type[DataError] | type[CheckpointError]] = {
    "data": DataError,
    "checkpoint": CheckpointError,
}


class Workers:
    """A pool for one kind of work."""

    def __init__(self, num_workers: int, work: Work, name: str = "k25-prepare") -> None:
        self._work = work
        self._name = name
        self._pids: list[int] = []
        self._connections: list[Connection] = []
        if sys.platform == "linux":
            for _ in range(num_workers):
                self._start()

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[str, Any, Any]]:
        """Yields ("progress" or "done", task, what was reported or returned), and ("idle", None, None).

        Raises K25Error for one that a worker raised; MachineError if a worker ended.
        """
        if not self._connections:
            yield from self._run_here(tasks)
            return
        todo = iter(tasks)
        busy: dict[Connection, Any] = {}
        free = list(self._connections)
        while True:
            while free and (task := next(todo, None)) is not None:
                worker = free.pop()
                busy[worker] = task
                self._send(worker, task)
            if not busy:
                return
            ready = connection.wait(list(busy), IDLE_S)
            if not ready:
                yield "idle", None, None
            for worker in [each for each in busy if each in ready]:
                task = busy[worker]
                kind, value = self._receive(worker, task)
                if kind == "done":
                    free.append(worker)
                    del busy[worker]
                yield kind, task, value

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._connections:
            worker.close()
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids, self._connections = [], []

    def _run_here(self, tasks: Iterable[Any]) -> Iterator[tuple[str, Any, Any]]:
        for task in tasks:
            reports: list[Any] = []
            result = self._work(task, reports.append)
            for report in reports:
                yield "progress", task, report
            yield "done", task, result

    def _start(self) -> None:
        ours, theirs = Pipe()
        self._pids.append(fork(self._name, 2, lambda: self._serve(theirs)))
        theirs.close()
        self._connections.append(ours)

    def _serve(self, parent: Connection) -> None:
        # One thread each: all cores are in use already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        while True:
            task = parent.recv()
            try:
                parent.send(("done", self._work(task, lambda report: parent.send(("progress", report)))))
            except Exception as error:  # whatever it is, the parent raises it
                parent.send(("failed", _told(error)))

    def _send(self, worker: Connection, task: Any) -> None:
        try:
            worker.send(task)
        except OSError as error:
            raise self._ended(worker, task) from error

    def _receive(self, worker: Connection, task: Any) -> tuple[str, Any]:
        try:
            kind, value = worker.recv()
        except (EOFError, OSError) as error:
            raise self._ended(worker, task) from error
        if kind == "failed":
            raise _raised(*value)
        return kind, value

    def _ended(self, worker: Connection, task: Any) -> MachineError:
        position = self._connections.index(worker)
        _, status = os.waitpid(self._pids.pop(position), 0)
        self._connections.pop(position).close()
        how = (
            f"signal {os.WTERMSIG(status)}"
            if os.WIFSIGNALED(status)
            else f"status {os.waitstatus_to_exitcode(status)}"
        )
        return MachineError(
            f"a worker process ended by {how} at {task}\n  -> if memory was used up (see dmesg), use fewer "
            "--workers; the same command goes on from what is done"
        )


def _told(error: Exception) -> tuple[str, str]:
    cause = named(error)
    if cause is None:
        return "fault", "".join(traceback.format_exception(error))
    kind = next((kind for kind, error_class in _KINDS.items() if isinstance(cause, error_class)), "machine")
    return kind, str(cause)


def _raised(kind: str, text: str) -> Exception:
    if kind == "fault":
        return RuntimeError(f"in a worker process:\n{text}")
    return _KINDS.get(kind, MachineError)(text)
