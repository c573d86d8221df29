"""One writer per run folder: two would write the same metrics and delete each other's checkpoints.

The lock is `lock.json` (`record.Holder`). A SLURM job holds it from its submission to its end, across
requeues, and its rank 0 while it trains; without SLURM, rank 0 holds it alone. It is created by a hard link,
which is atomic on NFS and Lustre, whereas flock is node-local on many of their mounts.

Whether a lock that was left behind still counts is decided by asking SLURM for a job, by looking up a process
of this machine, and otherwise by watching whether the holder renews it (`heartbeat`). Whoever takes the lock
of a dead holder X first creates `lock.json.claim.X`, which only one can, and then moves it over the lock.
If that process dies in between, its claim counts as the lock, and a successor claims that one.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k25_train.errors import K25Error
from k25_train.run_folder.heartbeat import is_renewed
from k25_train.run_folder.jobs import ENDED
from k25_train.run_folder.process import Liveness, liveness, this_process
from k25_train.run_folder.record import LOCK, Holder, LockedError, new_holder, parse

JobState = Callable[[int], str | None]
"""Job id -> the job's state, None if SLURM no longer knows the job."""
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
"""What a file system without hard links answers."""
MAX_TURNS = 200
"""Times that a lock may change hands while somebody tries to take it."""
RETRY_S = 0.05
"""Pause before another look at a lock that changes hands."""
EMPTY_S = 1.0
"""How long an empty lock is taken for one that is being written: without hard links, the file is there a
moment before its text."""


@dataclass(frozen=True, slots=True)
class Link:
    """A file that locks the folder, and for whom."""

    path: Path
    holder: Holder


def chain(run: Path) -> list[Link]:
    """The lock, then claims by processes that died while taking it; the last one counts. Empty if free.

    Raises `LockedError` if one is damaged, OSError if one cannot be read.
    """
    found: list[Link] = []
    path = run / LOCK
    while (holder := read(path)) is not None and all(holder.id != link.holder.id for link in found):
        found.append(Link(path, holder))
        path = claim_of(run, holder)
    return found


def read(path: Path) -> Holder | None:
    """The record in a file; None if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text:
            time.sleep(EMPTY_S)
            text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    return parse(path, text)


def claim_of(run: Path, holder: Holder) -> Path:
    """The file that whoever takes this holder's lock creates."""
    return run / f"{LOCK}.claim.{holder.id}"


def current(run: Path) -> Holder | None:
    """Who holds the folder, or held it last. Raises as `chain` does."""
    links = chain(run)
    return links[-1].holder if links else None


def acquire(run: Path, job_id: int, job_state: JobState) -> None:
    """Take the folder for a job, which may hold it already.

    Raises `LockedError` if a process or another job holds it, or is taking it at this moment.
    """
    holder = current(run)
    if holder is None or holder.job_id != job_id:
        take(run, new_holder(job_id, None), job_id, job_state)


def release(run: Path, job_id: int) -> None:
    """Release the folder if this job holds it."""
    links = chain(run)
    if links and links[-1].holder.job_id == job_id:
        for link in reversed(links):
            link.path.unlink(missing_ok=True)


def take(run: Path, mine: Holder, within_job: int | None, job_state: JobState) -> None:
    """Take the folder.

    Args:
        run: the run folder.
        mine: the record to write.
        within_job: SLURM job of this process, whose folder it may take.
        job_state: asks SLURM.

    Raises:
        LockedError: another holds the folder, or is taking it at this moment; or the lock is damaged.
        OSError: the folder cannot be written.
    """
    with written(run, mine) as scratch:
        for _ in range(MAX_TURNS):
            links = chain(run)
            if not links and link_once(scratch, run / LOCK):
                return
            if links:
                check_over(run, links[-1], within_job, job_state)
                if replace(run, links, scratch):
                    return
            time.sleep(RETRY_S)
    raise LockedError(f"{run / LOCK}: cannot be taken or read: see what it is (a broken link?) and remove it")


def check_over(run: Path, link: Link, within_job: int | None, job_state: JobState) -> None:
    """Raise `LockedError` unless the holder has ended, or is the SLURM job `within_job` without a process."""
    holder, process = link.holder, link.holder.process
    if process == this_process():
        return
    # 1. A process of this machine.
    found = Liveness.dead if process is None else liveness(process)
    if found is Liveness.alive:
        raise in_use(run, holder)
    # 2. A job; if it has ended, SLURM has ended its processes.
    if holder.job_id is not None and holder.job_id != within_job:
        state = ask_state(run, holder.job_id, job_state)
        if state is not None and state not in ENDED:
            held = f"; if SLURM holds it: `scontrol release {holder.job_id}`" if state == "PENDING" else ""
            raise LockedError(
                f"run.dir={run} belongs to job {holder.job_id}, which is {state}: follow that job, end it "
                f"with `scancel {holder.job_id}`, or choose another run.dir{held}"
            )
        return
    # 3. A process elsewhere.
    what = f"run.dir={run} was taken by {holder.describe()}"
    if found is Liveness.unknown and is_renewed(link.path, what, say):
        raise in_use(run, holder)


def in_use(run: Path, holder: Holder) -> LockedError:
    """The error of whoever comes second."""
    assert holder.process is not None
    if holder.job_id is not None:
        # A signal to one of its ranks would send the job back to the queue.
        return LockedError(
            f"run.dir={run} belongs to job {holder.job_id}, in which it is in use by {holder.describe()}: "
            f"follow that job, end it with `scancel {holder.job_id}`, or choose another run.dir"
        )
    stop = f"`kill {holder.process.pid}` on {holder.process.host}"
    return LockedError(
        f"run.dir={run} is in use by {holder.describe()}: wait for its end, have it save and stop ({stop}), "
        "or choose another run.dir"
    )


def ask_state(run: Path, job_id: int, job_state: JobState) -> str | None:
    """The state of the job that holds the folder. Raises `LockedError` if SLURM cannot be asked."""
    try:
        return job_state(job_id)
    except K25Error as error:
        raise LockedError(
            f"run.dir={run} belongs to SLURM's job {job_id}, and SLURM cannot be asked whether it has ended "
            f"({error}): start from a node where squeue works, or choose another run.dir; if "
            f"that job has ended for certain, remove {run / LOCK}"
        ) from error


def say(text: str) -> None:
    """Tell the user what is waited for."""
    print(text, flush=True)


def replace(run: Path, links: list[Link], scratch: Path) -> bool:
    """Put `scratch` in the place of a chain whose last holder has ended; False if another was faster."""
    claim = claim_of(run, links[-1].holder)
    if not link_once(scratch, claim):
        return False
    # From here on nobody else replaces this chain, but it may have been replaced before.
    first = read(run / LOCK)
    if first is None or first.id != links[0].holder.id:
        claim.unlink(missing_ok=True)
        return False
    os.replace(claim, run / LOCK)
    for link in links[1:]:
        link.path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def written(run: Path, holder: Holder) -> Iterator[Path]:
    """The record in a file of its own, on disk, as long as the context lasts."""
    scratch = run / f"{LOCK}.new.{holder.id}"
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(holder.to_json())
            file.flush()
            os.fsync(file.fileno())
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def link_once(source: Path, target: Path) -> bool:
    """Link `target` to `source`, or copy where there are no links, and return True; False if `target`
    exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        # Over NFS, a link whose first answer was lost exists when it is asked for again.
        try:
            return target.samefile(source)
        except FileNotFoundError:  # Whoever had it is done with it.
            return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True
