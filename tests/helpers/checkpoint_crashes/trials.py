"""Kinds of crashes, each drawn from a seed, and what has to be true after one."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k25_train.checkpoint import folders
from k25_train.checkpoint.commands.checks import check
from tests.helpers.checkpoint_crashes.jobs import PHASES, Job, Plan, state_of
from tests.helpers.checkpoint_crashes.judge import Found, look

FIRST, LAST = 3, 5
"""Steps of a job that is disturbed; earlier ones are there before."""
LONGEST_S = 0.03
"""Delay from the beginning of a phase to the crash, at most: phases of these small states are as long."""
WHOLE, NAMED = "a whole one comes up", "what is broken is named"


@dataclass(slots=True)
class Trial:
    """One crash."""

    kind: str
    rng: random.Random
    folder: Path
    """For it alone."""
    text: str = ""
    """What was done, in words."""
    outcome: str = WHOLE
    problems: list[str] = field(default_factory=list)
    """What must not be; empty if all is well."""

    @property
    def root(self) -> Path:
        """Of the checkpoints."""
        return self.folder / "checkpoints"

    def plan(self, **changes: int | Path | tuple[int, int]) -> Plan:
        """A job that saves steps `FIRST` to `LAST`."""
        values = {"root": self.root, "first": FIRST, "last": LAST, "keep": self.rng.randint(1, 2)}
        return Plan(**{**values, "keep_every": self.rng.choice([0, 2]), **changes})  # type: ignore[arg-type]

    def start(self, plan: Plan) -> Job:
        """Start a job."""
        scratch = self.folder / f"job_{self.rng.getrandbits(32):08x}"
        scratch.mkdir()
        return Job(plan, scratch)

    def prepare(self, last: int = FIRST - 1) -> None:
        """Have steps 1 to `last` saved, by a job whose checkpoints all trials next to this one begin with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = self.folder.parent / f"saved_{last}"
        if not saved.exists():
            with self.start(Plan(root=saved, first=1, last=last, keep=2)) as job:
                job.finish()
                assert not job.errors, job.errors
        shutil.copytree(saved, self.root, dirs_exist_ok=True)

    def look(self, *, salts: Sequence[int] = (0,), at_least: int) -> Found:
        """What is there now; a checkpoint that was said to be saved must not be lost."""
        found = look(self.root, salts)
        self.problems += found.problems
        if found.damaged:
            self.outcome = NAMED
        if found.newest is None or folders.step_of(found.newest) < at_least:
            self.problems.append(f"step {at_least} was saved, and {found.newest} comes up")
        return found

    def go_on(self, newest: Path | None) -> None:
        """A job that starts now saves the next steps, and leaves nothing but checkpoints."""
        step = 0 if newest is None else folders.step_of(newest)
        with self.start(self.plan(first=step + 1, last=step + 1)) as job:
            job.finish()
        if job.errors or job.saved != step + 1:
            self.problems.append(f"the next job did not save step {step + 1}: {job.errors}")
        self.problems += look(self.root, (0,)).problems


def kill(trial: Trial) -> None:
    """SIGKILL of all ranks."""
    _kill(trial)


def kill_one(trial: Trial) -> None:
    """SIGKILL of one of the ranks."""
    _kill(trial, trial.rng.randrange(2))


def _kill(trial: Trial, *ranks: int) -> None:
    trial.prepare()
    phase, step, delay_s = _moment(trial.rng)
    trial.text = f"{delay_s * 1000:.0f} ms into {phase} of step {step}"
    with trial.start(trial.plan()) as job:
        job.wait_for(phase, step)
        time.sleep(delay_s)
        job.kill(*ranks)
    found = trial.look(at_least=max(job.saved, FIRST - 1))
    trial.problems += [f"damaged by a kill: {each}" for each in found.damaged]
    trial.go_on(found.newest)


def undead(trial: Trial) -> None:
    """A rank that hangs, whose job is started again without it, and that goes on later."""
    trial.prepare()
    phase, step, delay_s = _moment(trial.rng)
    number = trial.rng.randrange(2)
    trial.text = f"rank {number}, {delay_s * 1000:.0f} ms into {phase} of step {step}"
    with trial.start(trial.plan()) as old:
        old.wait_for(phase, step)
        time.sleep(delay_s)
        old.signal(number, signal.SIGSTOP)
        newest = folders.newest_checkpoint(trial.root)
        again = folders.step_of(newest) + 1 if newest else 1
        with trial.start(trial.plan(first=again, last=again + 1, salt=1)) as job:
            job.wait_for("write", again)
            old.signal(number, signal.SIGCONT)
            job.finish()
        old.finish()
    _judge_rivals(trial, [old, job], max(job.saved, FIRST - 1))


def two_savers(trial: Trial) -> None:
    """Two jobs that save the same steps in one folder."""
    trial.prepare()
    trial.text = "the same steps at the same time"
    with trial.start(trial.plan()) as first:
        time.sleep(trial.rng.uniform(0, 4 * LONGEST_S))
        with trial.start(trial.plan(salt=1)) as second:
            second.finish()
        first.finish()
    _judge_rivals(trial, [first, second], FIRST - 1)


def _judge_rivals(trial: Trial, jobs: Sequence[Job], at_least: int) -> None:
    errors = [error for job in jobs for error in job.errors]
    if errors:
        trial.outcome = NAMED
    # A peer of a rank that ended by a named error loses its connection.
    unnamed = [error for error in errors if not error.startswith("named: ")]
    if unnamed and len(unnamed) == len(errors):
        trial.problems.append(f"no rank named its error: {unnamed}")
    found = trial.look(salts=(0, 1), at_least=at_least)
    trial.problems += [f"damaged by a rival: {each}" for each in found.damaged]


def full_disk(trial: Trial) -> None:
    """A disk with room for some checkpoints, and not for all."""
    trial.folder.mkdir(parents=True)
    size = int(trial.rng.uniform(1.3, 3.2) * checkpoint_bytes())
    trial.text = f"{size:,} bytes"
    trial.root.mkdir()
    with small_disk(trial.root, size):
        trial.prepare(last=1)
        with trial.start(trial.plan(first=2, last=4, keep=1, keep_every=0)) as job:
            job.finish()
        _judge_failure(trial, job, "[Errno 28]", least=1)


def file_limit(trial: Trial) -> None:
    """A rank whose files may not become as long as they are."""
    trial.prepare()
    rank, size = trial.rng.randrange(2), int(trial.rng.uniform(0, 0.24) * checkpoint_bytes())
    trial.text = f"{size:,} bytes per file of rank {rank}"
    with trial.start(trial.plan(most_bytes=(rank, max(1, size)))) as job:
        job.finish()
    _judge_failure(trial, job, "[Errno 27]", least=FIRST)


def _judge_failure(trial: Trial, job: Job, cause: str, *, least: int) -> None:
    """A job that cannot write says why, and what is safe."""
    if job.errors:
        trial.outcome = NAMED
        told = [error for error in job.errors if error.startswith("named: ")]
        if not told or not all(cause in error and "is complete" in error for error in told):
            trial.problems.append(f"the error does not name {cause} and what is complete: {job.errors}")
    found = trial.look(at_least=max(job.saved, least))
    trial.problems += [f"damaged by a write that failed: {each}" for each in found.damaged]


def truncated(trial: Trial) -> None:
    """A file of the newest checkpoint is cut short."""
    path = _victim(trial)
    size = path.stat().st_size
    rest = trial.rng.choice([0, size - 1, trial.rng.randrange(size)])
    trial.text = f"{path.name} to {rest:,} of {size:,} bytes"
    with path.open("r+b") as file:
        file.truncate(rest)
    _judge_damage(trial, path)


def flipped(trial: Trial) -> None:
    """A bit of the newest checkpoint changes."""
    path = _victim(trial)
    place, bit = trial.rng.randrange(path.stat().st_size), trial.rng.randrange(8)
    trial.text = f"bit {bit} of byte {place:,} of {path.name}"
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    _judge_damage(trial, path)


def _victim(trial: Trial) -> Path:
    trial.prepare()
    files = [path for path in sorted((trial.root / f"step_{FIRST - 1}").iterdir()) if path.stat().st_size]
    small = [path for path in files if path.suffix != ".safetensors"]
    shards = [path for path in files if path.suffix == ".safetensors"]
    return trial.rng.choice(trial.rng.choice([shards, shards, shards, small]))


def _judge_damage(trial: Trial, path: Path) -> None:
    """The broken file is named, by a load and by `k25-checkpoint verify`; the one before is whole."""
    found = trial.look(at_least=FIRST - 2)
    if not any(str(path) in text for text in found.damaged):
        trial.problems.append(f"a load does not name {path.name}: {found.damaged}")
    faults = check(path.parent, 2, lambda _: None).faults
    if not any(str(path) in fault for fault in faults):
        trial.problems.append(f"verify does not name {path.name}: {faults}")
    if others := check(trial.root / f"step_{FIRST - 2}", 2, lambda _: None).faults:
        trial.problems.append(f"the checkpoint before is not whole: {others}")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Within: the folder is a disk of its own. Raises `CalledProcessError` without the right to mount."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may make disks."""
    folder.mkdir(parents=True)
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checkpoint_bytes() -> int:
    """Bytes of the tensors of a checkpoint."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_of(0, 0).values())


def _moment(rng: random.Random) -> tuple[str, int, float]:
    """Phase and step of a crash, and seconds from its beginning."""
    phase = rng.choice(PHASES)
    return phase, rng.randint(FIRST, LAST), rng.uniform(0, LONGEST_S if phase != "commit" else LONGEST_S / 3)


KINDS: Mapping[str, tuple[Callable[[Trial], None], int]] = {
    "SIGKILL of all ranks": (kill, 40),
    "SIGKILL of one rank": (kill_one, 12),
    "a rank that comes back": (undead, 6),
    "disk full": (full_disk, 8),
    "file too large": (file_limit, 6),
    "shard truncated": (truncated, 8),
    "bit flipped": (flipped, 12),
    "two savers": (two_savers, 8),
}
"""Kind -> what it does, and how many of a hundred trials are of it."""


def kinds(count: int) -> list[str]:
    """The kinds of so many trials, in an order in which any number of first ones is a fair sample."""
    places = [
        ((index + 0.5) / weight, name) for name, (_, weight) in KINDS.items() for index in range(weight)
    ]
    ordered = [name for _, name in sorted(places)]
    return [ordered[index % len(ordered)] for index in range(count)]


def run_trial(kind: str, seed: int, folder: Path) -> Trial:
    """Crash, look, and remove what is left."""
    trial = Trial(kind, random.Random(seed), folder)
    try:
        KINDS[kind][0](trial)
    except Exception as error:  # what no error names is a violation, too
        trial.problems.append(f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return trial
