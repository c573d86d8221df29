"""Ends a job in which a rank makes no progress, and reports which rank, in what phase, waiting for whom.

Each rank has a thread that checks a few times per timeout. The first rank that has not entered or left a
phase for `timeout_s` raises the alarm; every rank then answers with its state, writes its stacks to its own
file, and ends. The rank that raised the alarm prints the only report. Ranks that do not answer are dead or
stopped.

Three cases are handled elsewhere:
- a rank that dies: its peers get an error from gloo at once, and torchrun ends the job;
- a hang in a phase that may be long (a checkpoint), or before the first step: the timeout of the process
  group ends it. It is longer than this watchdog's, which therefore reports first where both apply;
- an interpreter in which no thread can run, as when native code keeps the lock: faulthandler's own thread,
  which needs no interpreter, prints the stacks and ends the rank, a little later than its peers.

On CUDA the host only submits work, so a hang shows where the host next waits for the device. NCCL knows more
about the collectives themselves: torch's flight recorder keeps the last ones, and each rank writes them to
the run folder when the process group times out (`launch/fabric.py` sets its variables).
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.rank_states import RankStateStore
from parallel.watchdog.states import RankState, findings, report

STALLED_STATUS = 75
"""Exit status of a rank that ends because of a stall: EX_TEMPFAIL of sysexits.h, "try again"."""
FINDINGS = "stall.json"
"""The culprits of the latest report, next to the stacks."""
_MAX_CHECK_INTERVAL_S = 10.0
_GRACE_S = 5.0
"""Time in which a live rank on a busy machine answers, in addition to its check interval."""
_DEAD_INTERPRETER_S = 20.0
"""Time beyond `timeout_s` after which faulthandler ends the rank: later than the watchdog, and before
torchrun's SIGKILL, 30 s after the first rank has ended."""


class StallWatchdog:
    """A context manager around training: within it, a stall ends the process."""

    def __init__(
        self,
        tracker: PhaseTracker,
        store: RankStateStore,
        *,
        timeout_s: float,
        folder: Path,
        device_is_busy: Callable[[], bool],
        end: Callable[[int], None] = os._exit,
        limit: str = "train.stall_timeout_s",
    ) -> None:
        """`folder` gets a `rank_<N>.stall.txt`; `device_is_busy` says if the GPU has work left; `limit` names
        `timeout_s` in the report."""
        self.tracker = tracker
        self.store = store
        self.timeout_s = timeout_s
        self.folder = folder
        self.check_interval_s = min(timeout_s / 10, _MAX_CHECK_INTERVAL_S)
        self._device_is_busy = device_is_busy
        self._end = end
        self._limit = limit
        self._is_leaving = threading.Event()
        self._thread = threading.Thread(target=self._check_periodically, name="stall watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.store.publish(self.tracker.state())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_leaving.set()
        self._thread.join(timeout=_GRACE_S)
        faulthandler.cancel_dump_traceback_later()

    def _check_periodically(self) -> None:
        late = self.timeout_s + _DEAD_INTERPRETER_S
        try:
            while not self._is_leaving.wait(self.check_interval_s):
                faulthandler.dump_traceback_later(late, exit=True, file=sys.__stderr__ or 2)
                self.check()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def check(self) -> None:
        """Publish this rank's state; raise the alarm if it is stuck; answer an alarm, and end."""
        stuck = self.tracker.seconds_without_progress() >= self.timeout_s
        try:
            self.store.publish(self.tracker.state())
            # A rank that waits for one in a long phase is not stuck.
            if stuck and not self._is_excused():
                self.store.raise_alarm()
            alarm = self.store.alarm()
        except RuntimeError as error:
            # The store is gone, as at the end of a job. Only a stuck rank has something to report.
            if not stuck:
                return
            self._report_alone(error)
        else:
            if alarm is not None:
                self._answer_alarm(alarm)

    def _is_excused(self) -> bool:
        """Whether some rank is in a phase that may be long, such as deleting old checkpoints."""
        return any(state.may_be_long for state in self.store.states().values())

    def _answer_alarm(self, alarm: int) -> None:
        state = self._own_state()
        lines = [str(state)]
        # The store is lost when its host ends, so others wait until the report is printed.
        try:
            self.store.answer(state)
            if alarm == self.tracker.rank:
                lines = [*self._report(), "", *lines]
                self.store.mark_reported()
                self._write(lines)
            else:
                self._write(lines)
                self._wait(self.store.is_reported, 2 * self._answer_time_s)
        except RuntimeError as error:
            # The host of the store has ended already, or is the one that does not answer.
            write_to_stderr(f"{state}\nthe job's store does not answer: {error}")
        self._end(STALLED_STATUS)

    def _report(self) -> list[str]:
        """Wait for answers and print the report; returns its lines and the state of every rank."""
        store = self.store
        self._wait(lambda: len(store.answers()) == store.world_size, self._answer_time_s)
        answers, last_seen = store.answers(), store.states()
        self._write_findings(findings(answers, last_seen, self.tracker.rank, store.world_size))
        text = report(
            answers,
            last_seen,
            self.tracker.rank,
            store.world_size,
            headline=self._headline(answers[self.tracker.rank]),
            logs=str(self.folder / "rank_<N>.stall.txt"),
        )
        write_to_stderr(text)
        return [*text.splitlines(), "", *(str(answers[rank]) for rank in sorted(answers))]

    def _report_alone(self, error: RuntimeError) -> None:
        state = self._own_state()
        lines = [self._headline(state), str(state), f"the job's store does not answer: {error}"]
        write_to_stderr("\n".join(lines))
        self._write(lines)
        self._end(STALLED_STATUS)

    def _headline(self, state: RankState) -> str:
        return (
            f"STALL: rank {state.rank} made no progress for {state.seconds:.1f} s in {state.doing} "
            f"({self._limit}={self.timeout_s:g}); the job ends"
        )

    def _own_state(self) -> RankState:
        return self.tracker.state(device_is_busy=self._device_is_busy())

    @property
    def _answer_time_s(self) -> float:
        return 2 * self.check_interval_s + _GRACE_S

    def _wait(self, happened: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened() and time.monotonic() < deadline:
            time.sleep(min(self.check_interval_s, 0.2))

    def _write(self, lines: list[str]) -> None:
        """Write the lines and the stacks of all threads to this rank's file, or to stderr if that fails."""
        path = self.folder / f"rank_{self.tracker.rank}.stall.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), *lines, "", sep="\n", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            write_to_stderr(f"{path}: cannot be written ({error}); the stacks of rank {self.tracker.rank}:")
            faulthandler.dump_traceback(2, all_threads=True)

    def _write_findings(self, found: Mapping[str, Any]) -> None:
        """Write what the report says to a file for programs, which take it away; it is printed anyway."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self.folder / f"{FINDINGS}.{os.getpid()}"
            scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
            scratch.replace(self.folder / FINDINGS)
        except OSError as error:
            write_to_stderr(f"{self.folder / FINDINGS}: cannot be written ({error})")


def write_to_stderr(text: str) -> None:
    """Write to stderr without Python's lock on it, which the stuck thread may hold."""
    os.write(2, f"{text}\n".encode())
