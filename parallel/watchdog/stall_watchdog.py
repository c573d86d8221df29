"""Ends a job in which a rank makes no progress, after saying which, in what, and whom it waits for.

A thread of every rank looks a few times per timeout. The first rank that has not entered or left a phase for
`timeout_s` raises the alarm; every rank then answers with its state, writes its stacks to its own file, and
ends. The rank that raised the alarm prints the one report. Ranks that do not answer are dead or stopped.

Three cases are not this guard's:
- a rank that dies: its peers get an error from gloo at once, and torchrun ends the job;
- a hang in a phase that may be long (a checkpoint), or before the first step: the timeout of the process
  group, which is longer than this one, so that this guard speaks first where both apply;
- an interpreter that no thread can run in, such as native code that keeps the lock: faulthandler's own
  thread, which needs no interpreter, prints the stacks and ends the rank, a little later than its peers.

On CUDA the host only submits work, so a hang shows where the host next waits for the device. NCCL knows more
of the collectives themselves: `TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1` make its
flight recorder keep the last ones, and its watchdog write them when the timeout of the process group is over.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.rank_states import RankStateStore
from parallel.watchdog.states import RankState, report

STALLED_STATUS = 75
"""Exit status of a rank that ends because of a stall: EX_TEMPFAIL of sysexits.h, "try again"."""
_MOST_SECONDS_BETWEEN_LOOKS = 10.0
_GRACE_S = 5.0
"""A live rank on a busy machine answers within this, beyond its time between looks."""
_DEAD_INTERPRETER_S = 20.0
"""Later than the guard, sooner than torchrun's SIGKILL, 30 s after the first rank has ended."""


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
    ) -> None:
        """`folder` gets `rank_<N>.stall.txt` of a stall; `device_is_busy` tells if the GPU has work left."""
        self.tracker = tracker
        self.store = store
        self.timeout_s = timeout_s
        self.folder = folder
        self.seconds_between_looks = min(timeout_s / 10, _MOST_SECONDS_BETWEEN_LOOKS)
        self._device_is_busy = device_is_busy
        self._end = end
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look_again_and_again, name="stall guard", daemon=True)

    def __enter__(self) -> Self:
        self.store.publish(self.tracker.state())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(timeout=_GRACE_S)
        faulthandler.cancel_dump_traceback_later()

    def _look_again_and_again(self) -> None:
        late = self.timeout_s + _DEAD_INTERPRETER_S
        try:
            while not self._left.wait(self.seconds_between_looks):
                faulthandler.dump_traceback_later(late, exit=True, file=sys.__stderr__ or 2)
                self.look()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def look(self) -> None:
        """Publish this rank's state; raise the alarm if it is stuck, and follow an alarm that is raised."""
        stuck = self.tracker.seconds_without_progress() >= self.timeout_s
        try:
            self.store.publish(self.tracker.state())
            if stuck and not self._is_excused():
                self.store.raise_alarm()
            alarm = self.store.alarm()
        except RuntimeError as error:
            # The store is gone, as at the end of a job. Only a rank that is stuck has something to tell.
            if not stuck:
                return
            self._report_alone(error)
        else:
            if alarm is not None:
                self._follow(alarm)

    def _is_excused(self) -> bool:
        """Whether a rank says that it is in a phase that may be long, such as deleting old checkpoints."""
        return any(state.may_be_long for state in self.store.states().values())

    def _follow(self, alarm: int) -> None:
        state = self._own_state()
        lines = [str(state)]
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
            # Its host has ended already, or is what does not answer.
            tell(f"{state}\nthe job's store does not answer: {error}")
        self._end(STALLED_STATUS)

    def _report(self) -> list[str]:
        """Print the report; returns its lines and the state of every rank."""
        store = self.store
        self._wait(lambda: len(store.answers()) == store.world_size, self._answer_time_s)
        answers = store.answers()
        text = report(
            answers,
            store.states(),
            self.tracker.rank,
            store.world_size,
            headline=self._headline(answers[self.tracker.rank]),
            logs=str(self.folder / "rank_<N>.stall.txt"),
        )
        tell(text)
        return [*text.splitlines(), "", *(str(answers[rank]) for rank in sorted(answers))]

    def _report_alone(self, error: RuntimeError) -> None:
        state = self._own_state()
        lines = [self._headline(state), str(state), f"the job's store does not answer: {error}"]
        tell("\n".join(lines))
        self._write(lines)
        self._end(STALLED_STATUS)

    def _headline(self, state: RankState) -> str:
        return (
            f"STALL: rank {state.rank} made no progress for {state.seconds:.1f} s in {state.doing} "
            f"(train.stall_timeout_s={self.timeout_s:g}); the job ends"
        )

    def _own_state(self) -> RankState:
        return self.tracker.state(device_is_busy=self._device_is_busy())

    @property
    def _answer_time_s(self) -> float:
        return 2 * self.seconds_between_looks + _GRACE_S

    def _wait(self, happened: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened() and time.monotonic() < deadline:
            time.sleep(min(self.seconds_between_looks, 0.2))

    def _write(self, lines: list[str]) -> None:
        """Write this rank's file: the lines, and the stacks of all threads; to stderr if that fails."""
        path = self.folder / f"rank_{self.tracker.rank}.stall.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), *lines, "", sep="\n", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            tell(f"{path}: cannot be written ({error}); the stacks of rank {self.tracker.rank}:")
            faulthandler.dump_traceback(2, all_threads=True)


def tell(text: str) -> None:
    """Write to stderr, past Python's own lock on it: the thread that is stuck may hold that."""
    os.write(2, f"{text}\n".encode())
