"""Real `torchrun` jobs, seen from outside: what they print, which processes they have, how they end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.helpers.project_sources import REPO

READING = "k25-data"
"""Name of a process that reads for a rank, which has the command and the environment of its rank."""


class Job:
    """`torchrun -m k25_train.train …`; leaving the context kills all of its processes."""

    def __init__(self, arguments: Sequence[str], num_ranks: int, log: Path) -> None:
        """Start it; `arguments` must have a unique run.dir, which identifies its processes."""
        (self._mark,) = [argument for argument in arguments if argument.startswith("run.dir=")]
        self._log = log
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with log.open("w") as output:
            self._torchrun = subprocess.Popen(
                [*torchrun, f"--nproc-per-node={num_ranks}", "-m", "k25_train.train", *arguments],
                cwd=REPO,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self._torchrun.wait()

    @property
    def output(self) -> str:
        """What torchrun and the ranks have printed so far."""
        return self._log.read_text()

    def processes(self) -> list[int]:
        """Processes of the job, torchrun included, that have not ended."""
        return [pid for pid in living() if self._mark in strings(pid, "cmdline")]

    def rank(self, number: int) -> int:
        """The process of a rank, not the one that reads for it."""
        marks = f"RANK={number}"
        found = [pid for pid in self.processes() if marks in strings(pid, "environ")]
        (pid,) = [pid for pid in found if strings(pid, "comm") != [f"{READING}\n"]]
        return pid

    def signal(self, number: signal.Signals) -> None:
        """Send torchrun a signal, as a scheduler does."""
        self._torchrun.send_signal(number)

    def terminate(self, num_ranks: int) -> None:
        """Send torchrun SIGTERM. The ranks are held still until theirs arrives: no step is done meanwhile."""
        ranks = [self.rank(number) for number in range(num_ranks)]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        # A thread that is still running would take SIGTERM, whichever signal arrived first.
        self.wait_until(lambda: all(_is_stopped(pid) for pid in ranks), timeout_s=20)
        self.signal(signal.SIGTERM)
        self.wait_until(lambda: all(_is_pending(pid, signal.SIGTERM) for pid in ranks), timeout_s=20)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)

    def wait_until(self, happened: Callable[[], bool], timeout_s: float) -> None:
        """Return as soon as `happened()`. Raises AssertionError with the output if the job ends without."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self._torchrun.poll() is None, f"the job ended:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s:\n{self.output}"
            time.sleep(0.02)

    def wait_until_gone(self, timeout_s: float) -> None:
        """Return when no process is left, however torchrun ended. Raises AssertionError if some stay."""
        deadline = time.monotonic() + timeout_s
        while self.processes():
            assert time.monotonic() < deadline, f"still running after {timeout_s:g} s:\n{self.output}"
            time.sleep(0.1)

    def wait(self, timeout_s: float) -> int:
        """The job's exit status. Raises AssertionError if it does not end in time or leaves a process."""
        try:
            status = self._torchrun.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {timeout_s:g} s:\n{self.output}") from error
        assert not self.processes(), f"processes outlive torchrun:\n{self.output}"
        return status


def living() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def strings(pid: int, name: str) -> list[str]:
    """The strings of /proc/<pid>/cmdline or environ; none where the process is gone or not ours."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _is_stopped(pid: int) -> bool:
    """Whether every thread of the process is stopped by SIGSTOP."""
    stats = [entry.read_text() for entry in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal is pending for the process."""
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending, 16) >> (number - 1) & 1)
