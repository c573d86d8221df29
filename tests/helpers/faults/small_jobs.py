"""Small jobs of the product's own command, on ranks that are forked instead of started, hence cheap.

What torchrun does for its ranks is done here: those that are left when one has failed are ended. Each rank
has a session of its own, so that whatever it leaves behind is found.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.helpers.faults import clock
from tests.helpers.faults.moments import Moment, Watch
from tests.helpers.ranks import RankContext, free_port

PRELOADED = "tests.helpers.faults.preload"
GRACE_S = 10.0
"""How long ranks have to end after one of them has failed, before they are killed, as torchrun does."""
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """How to start a job."""

    arguments: Sequence[str]
    """Overrides of the training command."""
    num_ranks: int
    scratch: Path
    """An empty folder for logs and for talking to the ranks."""
    run: Path
    """The run folder, whose files are watched; as the ranks name it, absolute or not."""
    folders: Sequence[Path]
    """Current folder of each rank."""
    moment: Moment | None = None
    """When to call for the fault."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of all ranks."""
    plant: Callable[[], None] | None = None
    """Called in each rank before the product starts, by tests of the bench, to make the product wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    statuses: tuple[int, ...]
    """Exit status of each rank; minus the signal's number where it was killed."""
    output: str
    """What the ranks printed, rank after rank."""
    has_reached: bool
    """Whether the moment of the fault came."""
    is_hung: bool
    """Whether it was ended after its time limit."""
    leftovers: tuple[int, ...]
    """Processes that outlived their rank."""
    counts: Mapping[str, int]
    """How often rank 0 reached each moment; empty unless it ended by itself."""


class SmallJob:
    """A job that runs; leaving the context kills what is left of it."""

    def __init__(self, spec: JobSpec) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self.spec = spec
        self.failed_at: float | None = None
        self._clock_shift_s = 0
        port = free_port()
        self.ranks: list[BaseProcess] = []
        spec.scratch.mkdir(parents=True, exist_ok=True)
        for rank in range(spec.num_ranks):
            process = context.Process(target=run_rank, args=(spec, RankContext(rank, spec.num_ranks, port)))
            process.start()
            self.ranks.append(process)

    def run(self, fault: Callable[[SmallJob], None], timeout_s: float) -> Outcome:
        """Wait until all ranks have ended; `fault` is called once, when the spec's moment is reached."""
        reached, deadline = _reached_file(self.spec.scratch), time.monotonic() + timeout_s
        has_reached = is_hung = False
        while running := [rank for rank in self.ranks if rank.is_alive()]:
            wait([rank.sentinel for rank in running], timeout=_POLL_S * 4)
            if not has_reached and reached.exists():
                has_reached = True
                fault(self)
                self._let_go()
            self._end_those_left()
            if time.monotonic() > deadline:
                is_hung = True
                break
        leftovers = self.kill()
        return Outcome(
            statuses=tuple(_status(rank) for rank in self.ranks),
            output="".join(_log(self.spec.scratch, rank) for rank in range(self.spec.num_ranks)),
            has_reached=has_reached,
            is_hung=is_hung,
            leftovers=leftovers,
            counts=_counts(self.spec.scratch),
        )

    def signal(self, number: int, ranks: Sequence[int]) -> None:
        """Send some ranks a signal; those that have ended get none."""
        for rank in ranks:
            if self.ranks[rank].is_alive():
                os.kill(self._pid(rank), number)

    def shift_clock(self, seconds: int) -> None:
        """Have the rank that is held see another time of day from now on."""
        self._clock_shift_s = seconds

    def _let_go(self) -> None:
        go, draft = _go_file(self.spec.scratch), self.spec.scratch / "go.draft"
        draft.write_text(str(self._clock_shift_s))
        draft.rename(go)

    def kill(self) -> tuple[int, ...]:
        """Kill all ranks; returns what outlived a rank that had ended by itself, which is killed too."""
        leftovers: list[int] = []
        for index, rank in enumerate(self.ranks):
            has_ended = not rank.is_alive()
            members = members_of_session(self._pid(index))
            for pid in members:
                _kill(pid)
            rank.join()
            leftovers += members if has_ended else ()
        return tuple(leftovers)

    def _end_those_left(self) -> None:
        """As torchrun: once a rank has failed, SIGTERM for the others, and SIGKILL after a while."""
        if not any(rank.exitcode for rank in self.ranks):
            return
        now = time.monotonic()
        if self.failed_at is None:
            self.failed_at = now
            self.signal(signal.SIGCONT, range(len(self.ranks)))
            self.signal(signal.SIGTERM, range(len(self.ranks)))
        elif now > self.failed_at + GRACE_S:
            self.signal(signal.SIGKILL, range(len(self.ranks)))

    def _pid(self, rank: int) -> int:
        pid = self.ranks[rank].pid
        assert pid is not None
        return pid

    def __enter__(self) -> SmallJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def run_rank(spec: JobSpec, context: RankContext) -> None:
    """In the rank: become what torchrun would have started, and run the training command."""
    os.setsid()
    _redirect(spec.scratch / f"rank_{context.rank}.log")
    os.environ.update(context.environment() | {"COLUMNS": "200"} | dict(spec.environment))
    os.chdir(spec.folders[context.rank])
    sys.argv = ["k25_train.train", *spec.arguments]
    is_meant = spec.moment is not None and spec.moment.rank == context.rank
    watch = Watch(spec.moment if is_meant else None, lambda: _hold(spec.scratch))
    watch.install(spec.run)
    if spec.plant is not None:
        spec.plant()
    import torch

    from k25_train.train import main

    torch.set_num_threads(1)
    try:
        main()
    finally:
        if context.rank == 0:
            (spec.scratch / "counts.json").write_text(json.dumps(watch.counts))


def _hold(scratch: Path) -> None:
    """Tell the parent that the moment has come, and wait until it has done what it wants."""
    _reached_file(scratch).touch()
    while not _go_file(scratch).exists():
        time.sleep(_POLL_S)
    if seconds := int(_go_file(scratch).read_text()):
        clock.shift(seconds)


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def members_of_session(leader: int) -> tuple[int, ...]:
    """Living processes of the session that `leader` opened."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(entry.name))
    return tuple(found)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _reached_file(scratch: Path) -> Path:
    return scratch / "reached"


def _go_file(scratch: Path) -> Path:
    return scratch / "go"


def _log(scratch: Path, rank: int) -> str:
    log = scratch / f"rank_{rank}.log"
    return log.read_text(errors="replace") if log.exists() else ""


def _counts(scratch: Path) -> dict[str, int]:
    file = scratch / "counts.json"
    return json.loads(file.read_text()) if file.exists() and file.stat().st_size else {}


def _status(rank: BaseProcess) -> int:
    assert rank.exitcode is not None
    return rank.exitcode
