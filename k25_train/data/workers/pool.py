"""The workers of a rank: units go out in order to whoever is free, results come back in order.

Which worker reads what is left to chance, and nothing depends on it. What is out is bounded in bytes: a unit
waits until results before it have been taken. A worker that dies is replaced, and what it had is read again
by the next one. One that does not finish a unit within some read timeouts hangs, in a decoder most likely:
reads have a deadline of their own. It is ended as one that has died. A unit that two workers were lost to
ends the run.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from k25_train.config.data import MAX_WORKERS_LOST, UNIT_READ_TIMEOUTS
from k25_train.config.schema import Config
from k25_train.config.vision import VisionConfig
from k25_train.data.channel import Channel, readable
from k25_train.data.storage.counts import COUNTS
from k25_train.data.units import Read, Unit
from k25_train.data.workers.nursery import Nursery
from k25_train.data.workers.worker import Done, Task, worker
from k25_train.errors import DataError

logger = logging.getLogger(__name__)

IN_FLIGHT_BYTES = 2**28
"""Results that are being made or wait to be taken, of all workers of a rank: 340 images of 512x512
pixels. A single larger unit goes out alone. Our choice."""
QUEUED_UNITS = 2
"""Units that a worker has at most: the one that it reads and one that follows. Our choice."""
ABORT_S = 2.0
"""How long a worker that hangs has to write its stack down before it is killed. Our choice."""

_KEEPS_DYING = (
    "Killed by signal 9 it was most likely for memory: give the job more, or lower data.workers or "
    "data.prefetch_steps. By another signal the file may crash its decoder: take it out of the data."
)
_TAKES_TOO_LONG = (
    "The file may hang its decoder: take it out of the data. If this node is that slow, raise "
    "data.read_timeout_s, of which this is a multiple."
)


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker as its reading process sees it."""

    pid: int
    channel: Channel
    log: int
    tasks: deque[Task] = field(default_factory=deque)
    """What it has not answered, in order; it reads the first."""
    started_s: float = 0.0
    """When it began to."""
    hung: bool = False
    """Whether it was ended for the time that it took."""

    def give(self, task: Task) -> None:
        """One more to read."""
        if not self.tasks:
            self.started_s = time.monotonic()
        self.tasks.append(task)
        # One that has ended is found out when its answer is waited for.
        with contextlib.suppress(OSError):
            self.channel.send(task)

    def answered(self) -> None:
        """It has begun with the next one."""
        self.tasks.popleft()
        self.started_s = time.monotonic()


class WorkerPool:
    """Reads units in worker processes (`UnitReading`); without any it has none to read."""

    def __init__(self, config: Config, left_open: Sequence[Channel]) -> None:
        """Fork the process that starts workers; they are started when they are needed first.

        Call it while this process has one thread. `left_open`: channels of this process, not for workers.
        """
        self._num_workers = config.data.workers
        self._vision: VisionConfig = config.model.vision
        self._workers: list[_Worker] = []
        self._num_tasks = 0
        self._unit_timeout_s = UNIT_READ_TIMEOUTS * config.data.read_timeout_s
        self._nursery = Nursery(worker(config), [each.socket for each in left_open])

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [each.pid for each in self._workers]

    def follow(self) -> None:
        """Run on the processors that this process is bound to, now and after a restart."""
        for pid in (self._nursery.pid, *self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(pid, os.sched_getaffinity(0))

    def read(self, units: Sequence[Unit]) -> Iterator[Read]:
        """See `UnitReading`. Raises `DataError` also where workers keep dying of a unit."""
        while len(self._workers) < self._num_workers:
            self._workers.append(self._start())
        reading = _Reading(units, self._num_tasks, self._vision)
        self._num_tasks += len(units)
        for number in reading.numbers:
            while number not in reading.done:
                self._hand_out(reading)
                self._collect(reading)
            done = reading.take(number)
            if done.error is not None:
                raise done.error
            assert done.result is not None
            yield Read(done.result, done.skipped)

    def close(self) -> None:
        """End all workers."""
        for each in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
            self._leave(each)
        self._workers.clear()
        self._nursery.close()

    def _hand_out(self, reading: "_Reading") -> None:
        while reading.waiting:
            free = min(self._workers, key=lambda each: len(each.tasks))
            if len(free.tasks) >= QUEUED_UNITS or not reading.has_room:
                return
            free.give(reading.next_task())

    def _collect(self, reading: "_Reading") -> None:
        """Wait until a worker answers or ends; end those that hang."""
        busy = {each.channel: each for each in self._workers if each.tasks}
        first_s = min(each.started_s for each in busy.values()) + self._unit_timeout_s
        ready = readable(list(busy), max(first_s - time.monotonic(), 0.0))
        if not ready:
            self._end_hung(list(busy.values()), reading)
        for channel in ready:
            at = busy[channel]
            try:
                done: Done = at.channel.receive()
            except (EOFError, ConnectionError):
                self._replace(at, reading)
                continue
            at.answered()
            COUNTS.add_all(done.counts)
            # After an error workers still answer what they had; those answers are nobody's.
            if done.number in reading.numbers:
                reading.done[done.number] = done

    def _end_hung(self, busy: Sequence[_Worker], reading: "_Reading") -> None:
        """End workers whose time is over, when nobody has answered."""
        for each in busy:
            if time.monotonic() - each.started_s < self._unit_timeout_s:
                continue
            # First so that its stack goes to its last words; one that is stopped does not hear that.
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL if each.hung else signal.SIGABRT)
            if each.hung:
                self._replace(each, reading)
            else:
                each.hung = True
                each.started_s = time.monotonic() - self._unit_timeout_s + ABORT_S

    def _replace(self, dead: _Worker, reading: "_Reading") -> None:
        """Start another worker in the place of one that has ended, with all that it had to do."""
        how = self._nursery.ended(dead.pid)
        words = os.pread(dead.log, 4000, 0).decode(errors="replace").strip()
        self._leave(dead)
        self._workers.remove(dead)
        first = dead.tasks[0]
        lost = reading.lost[first.number] = reading.lost.get(first.number, 0) + 1
        told = f"; its last words:\n{words}\n" if words else ". "
        if dead.hung:
            how = f"was ended ({how}), since it took more than {self._unit_timeout_s:g} s"
        story = f"a worker that reads data (pid {dead.pid}) {how} while it read {first.unit.places()}{told}"
        if lost >= MAX_WORKERS_LOST and first.number in reading.numbers:
            remedy = _TAKES_TOO_LONG if dead.hung else _KEEPS_DYING
            raise DataError(
                f"{story}It is the second one that did. {remedy} Then start again: the run goes on from its "
                "newest checkpoint."
            )
        logger.warning("%sAnother takes its place.", story)
        new = self._start()
        self._workers.append(new)
        for task in dead.tasks:
            if task.number in reading.numbers:
                new.give(task)

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = os.memfd_create("k25-train data worker log")
        try:
            return _Worker(self._nursery.start(theirs, log), Channel(ours), log)
        except OSError as error:
            raise DataError(
                f"no process for reading data can be started ({error}). Lower "
                f"data.workers={self._num_workers}, or raise the limit on processes (ulimit -u)."
            ) from error
        finally:
            theirs.close()

    @staticmethod
    def _leave(dead: _Worker) -> None:
        dead.channel.close()
        os.close(dead.log)


class _Reading:
    """One call of `WorkerPool.read`: what is left to hand out, what is out, what has come."""

    def __init__(self, units: Sequence[Unit], first: int, vision: VisionConfig) -> None:
        self.numbers = range(first, first + len(units))
        self.waiting = deque(Task(*each) for each in zip(self.numbers, units, strict=True))
        self.done: dict[int, Done] = {}
        self.lost: dict[int, int] = {}
        """Unit -> workers that died of it or hung in it."""
        self._vision = vision
        self._out_bytes: dict[int, int] = {}

    @property
    def has_room(self) -> bool:
        """Whether the next unit may go out now."""
        next_bytes = self.waiting[0].unit.result_bytes(self._vision)
        return not self._out_bytes or sum(self._out_bytes.values()) + next_bytes <= IN_FLIGHT_BYTES

    def next_task(self) -> Task:
        """Take the next one to hand out."""
        task = self.waiting.popleft()
        self._out_bytes[task.number] = task.unit.result_bytes(self._vision)
        return task

    def take(self, number: int) -> Done:
        """Take what has come."""
        del self._out_bytes[number]
        return self.done.pop(number)
