"""The reading of one rank in a process of its own, which plans, reads and decodes while the rank trains.

It is forked from the rank before that has threads or a CUDA context, and holds the index, which the rank does
not. It answers one request at a time and makes steps ahead in between. It ends with its rank, by the kernel
if the rank is killed, and ignores the signals that ask a rank to stop: the rank finishes its step first.

An index in memory-mapped files would be shared by all of a node's readers, as it is by any processes.
"""

import contextlib
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from k25_train.config.schema import Config
from k25_train.data.channel import Channel, Letter, readable
from k25_train.data.child_process import fork
from k25_train.data.portable_errors import portable
from k25_train.data.regions import PageLock, leave_pageable
from k25_train.data.share_reader import HostInputs, Share
from k25_train.data.skip_log import NewSkips, SkipLog
from k25_train.data.source import Opened, ThreadSource
from k25_train.data.storage.counts import COUNTS
from k25_train.data.workers.pool import WorkerPool
from k25_train.errors import ConfigError, DataError

NAME = "k25-data"
"""Of the process, where `top` shows names."""
_KILLED = (
    "A SIGKILL that nobody sent is the kernel's when memory runs out (`dmesg` names the process): give the "
    "job more memory, or lower data.prefetch_steps. "
)
_REMEDY = (
    "Then start again: the run goes on from its newest checkpoint. With data.read_in=thread reading is part "
    "of the rank."
)


class _Request(NamedTuple):
    """A method of `ThreadSource`, with its arguments."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a request gave."""

    result: Any
    """What the method returned."""
    error: BaseException | None
    """What it raised instead."""
    skipped: dict[str, str]
    """Samples found unusable since the last answer, or before: where they are -> why."""
    num_seen: int
    """Samples drawn so far, of all ranks."""
    counts: Mapping[str, int]
    """What reading has cost since the last answer."""


class ReadingProcess:
    """The rank's end: a `DataSource`."""

    def __init__(self, config: Config) -> None:
        """Fork the process. Raises `ConfigError` where there is no Linux."""
        if sys.platform != "linux":
            raise ConfigError(
                f"data.read_in=process needs Linux, this is {sys.platform}: set data.read_in=thread"
            )
        self.skip_log = SkipLog(config.data.max_skipped_samples)
        self._facts: dict[str, str] = {}
        self._why_ended = ""
        self._channel, theirs = Channel.pair()
        self._log = os.memfd_create("k25-train data log")
        self.pid = fork(NAME, self._log, lambda: _serve(config, theirs, self._channel, self._log))
        theirs.close()

    def open(self) -> Opened:
        """See `DataSource`."""
        # The rank may have been bound to its GPU's NUMA node since the fork. Threads, and pages of what is
        # shared, follow the process that makes them.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(self.pid, os.sched_getaffinity(0))
        opened: Opened = self._ask("open")
        return opened

    def facts(self) -> dict[str, str]:
        """See `DataSource`."""
        # Kept: what is saved when the process has ended needs them, too.
        self._facts = self._facts or self._ask("facts")
        return self._facts

    def take(self, share: Share, page_lock: PageLock = leave_pageable) -> None:
        """See `DataSource`."""
        self._channel.received.page_lock = page_lock
        self._ask("take", share)
        if share.rank == 0:
            self.facts()

    def start_from(self, step: int, state: Mapping[str, Any]) -> None:
        """See `DataSource`."""
        self._ask("start_from", step, state)

    def step(self, step: int) -> HostInputs:
        """See `DataSource`. Raises `DataError` also if the process has ended."""
        inputs: HostInputs = self._ask("step", step)
        return inputs

    def evaluation(self, num_sequences: int, shuffle_media_seed: int | None) -> HostInputs:
        """See `DataSource`."""
        inputs: HostInputs = self._ask("evaluation", num_sequences, shuffle_media_seed)
        return inputs

    def close(self) -> None:
        """End the process; it has nothing that would be lost."""
        if not self._why_ended:
            os.kill(self.pid, signal.SIGKILL)
            self._bury("was closed")

    def _bury(self, how: str) -> None:
        """Take leave of a process that has ended, or will at once; `how`, if it is known."""
        self._why_ended = how or "has ended. "
        with contextlib.suppress(ChildProcessError):
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._why_ended = how or self._last_words(code)
        self._channel.close()
        os.close(self._log)

    def _last_words(self, code: int) -> str:
        """How the process ended, by its exit code as `subprocess` has it."""
        ended_by = f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        told = os.pread(self._log, 4000, 0).decode(errors="replace").strip()
        remedy = _KILLED if code == -signal.SIGKILL else ""
        return f"{ended_by}; its last words:\n{told}\n{remedy}" if told else f"{ended_by}. {remedy}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._why_ended:
            raise self._ended()
        try:
            self._channel.send(_Request(method, arguments))
            answer: _Answer = self._channel.receive()
        except (EOFError, ConnectionError) as error:
            self._bury("")
            raise self._ended() from error
        except OSError as error:
            # What it sends next would be the answer to this request.
            os.kill(self.pid, signal.SIGKILL)
            self._bury(f"was ended, since this rank cannot use the memory that they share: {error}. ")
            raise self._ended() from error
        self.skip_log.saw_in_all(answer.num_seen)
        COUNTS.add_all(answer.counts)
        for name, reason in answer.skipped.items():
            self.skip_log.add_named(name, reason, log=False)
        if answer.error is not None:
            raise answer.error
        return answer.result

    def _ended(self) -> DataError:
        return DataError(
            f"the process that reads this rank's data (pid {self.pid}) {self._why_ended}{_REMEDY}"
        )


def _serve(config: Config, channel: Channel, other_end: Channel, log: int) -> None:
    """Answer requests until the rank is gone; in between make the next steps."""
    # The rank alone holds its end: this process notices when it is closed.
    other_end.close()
    faulthandler.enable(log)
    # The rank has threads for its own work; one per reader is its share of a node.
    torch.set_num_threads(1)
    # Before anything here has threads.
    workers = WorkerPool(config, [channel]) if config.data.workers else None
    source = ThreadSource(_without_thread(config), workers)
    no_skips = SkipLog(0)
    skips = NewSkips(lambda: source.skip_log if hasattr(source, "loader") else no_skips)
    written: dict[int, Letter] = {}
    ahead: list[int] = []
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            if ahead and not readable([channel], 0.0):
                # Written now, so that the rank only has to be told where.
                step = ahead.pop(0)
                written[step] = channel.write(_answer(source, _Request("step", (step,)), skips))
                continue
            request: _Request = channel.receive()
            if request.method != "step":
                channel.send(_answer(source, request, skips))
                continue
            (step,) = request.arguments
            if step not in written:
                written[step] = channel.write(_answer(source, request, skips))
            channel.pass_on(written.pop(step))
            wanted = range(step + 1, min(step + 1 + config.data.prefetch_steps, config.train.steps))
            for stale in written.keys() - set(wanted):
                channel.drop(written.pop(stale))
                skips.tell_again()
            ahead = [step for step in wanted if step not in written]


def _answer(source: ThreadSource, request: _Request, skips: NewSkips) -> _Answer:
    """Do what is asked; errors are the answer's."""
    result, error = None, None
    try:
        result = getattr(source, request.method)(*request.arguments)
    except Exception as raised:  # told to the rank, which ends by it as by its own
        error = portable(raised)
    if request.method == "open":
        # The index lives as long as the process: looking for garbage in it would take seconds.
        gc.freeze()
    return _Answer(result, error, *skips.take(), COUNTS.take())


def _without_thread(config: Config) -> Config:
    """The same for a process that reads ahead by itself."""
    return replace(config, data=replace(config.data, prefetch_steps=0))
