"""The workers of a rank: units go out in order to whoever is free, results come back in order.

Which worker reads what is left to chance, and nothing depends on it. What is out is bounded in bytes: a unit
waits until results before it have been taken. A worker that dies is replaced, and what it had is read again
by the next one; a unit that two workers died of ends the run.
"""

import contextlib
import logging
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from k25_train.config.model import VisionConfig
from k25_train.config.schema import Config
from k25_train.data.channel import Channel
from k25_train.data.storage.counts import COUNTS
from k25_train.data.units import Read, Unit
from k25_train.data.workers.nursery import Nursery
from k25_train.data.workers.worker import Done, Task, worker
from k25_train.errors import DataError

logger = logging.getLogger(__name__)

IN_FLIGHT_BYTES = 2**28
"""Results that are being made or wait to be taken, of all workers of a rank: 80 images of 512x512 pixels as
float32. A single larger unit goes out alone. Our choice."""
QUEUED_UNITS = 2
"""Units that a worker has at most: the one that it reads and one that follows. Our choice."""
MAX_DEATHS = 2
"""Workers that may die while they read the same unit. Our choice: the kernel ends whatever process it likes
when memory runs out, but hardly twice the same."""


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker as its reading process sees it."""

    pid: int
    channel: Channel
    log: int
    tasks: deque[Task] = field(default_factory=deque)
    """What it has not answered, in order; it reads the first."""


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
            task = reading.next_task()
            free.tasks.append(task)
            # One that has ended is found out when its answer is waited for.
            with contextlib.suppress(OSError):
                free.channel.send(task)

    def _collect(self, reading: "_Reading") -> None:
        """Wait until a worker answers or ends."""
        busy = [each for each in self._workers if each.tasks]
        for each in select.select(busy_channels := [each.channel for each in busy], [], [])[0]:
            at = busy[busy_channels.index(each)]
            try:
                done: Done = at.channel.receive()
            except (EOFError, ConnectionError):
                self._replace(at, reading)
                continue
            at.tasks.popleft()
            COUNTS.add_all(done.counts)
            # After an error workers still answer what they had; those answers are nobody's.
            if done.number in reading.numbers:
                reading.done[done.number] = done

    def _replace(self, dead: _Worker, reading: "_Reading") -> None:
        """Start another worker in the place of one that has ended, with all that it had to do."""
        how = self._nursery.ended(dead.pid)
        words = os.pread(dead.log, 4000, 0).decode(errors="replace").strip()
        self._leave(dead)
        self._workers.remove(dead)
        first = dead.tasks[0]
        reading.deaths[first.number] = reading.deaths.get(first.number, 0) + 1
        told = f"; its last words:\n{words}\n" if words else ". "
        story = f"a worker that reads data (pid {dead.pid}) {how} while it read {first.unit.places()}{told}"
        if reading.deaths[first.number] >= MAX_DEATHS and first.number in reading.numbers:
            raise DataError(
                f"{story}It is the second one that did. Killed by signal 9 it was most likely for memory: "
                "give the job more, or lower data.workers or data.prefetch_steps. By another signal the file "
                "may crash its decoder: take it out of the data. Then start again: the run goes on from its "
                "newest checkpoint."
            )
        logger.warning("%sAnother takes its place.", story)
        new = self._start()
        self._workers.append(new)
        for task in dead.tasks:
            if task.number not in reading.numbers:
                continue
            new.tasks.append(task)
            with contextlib.suppress(OSError):
                new.channel.send(task)

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
        self.deaths: dict[int, int] = {}
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
