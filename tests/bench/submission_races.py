"""Ten simultaneous submissions of one run folder, each with its own learning rate, to a real SLURM.

    python -m tests.bench.submission_races [--rounds 20] [--submissions 10]

Starts a SLURM of one node on this machine, whose jobs wait in the queue. Every other round has a folder with
an earlier submission, whose job has ended. Each round has to end with one job, whose configuration, facts and
script are those of one submission, an error by name for each of the others, and nothing else left: no other
job, no lock but the job's, no staged file, no process. Prints counts, and what was wrong; ends with status 1
if anything was.
"""

import argparse
import collections
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import launch.slurm
from k25_train import entry
from k25_train.compose.resolve import load
from k25_train.run_folder import lock
from launch.submission import CONFIG, FACTS, SCRIPT, Submission
from tests.helpers.project_sources import REPO
from tests.helpers.slurm_cluster import Slurm, running_slurm

NAMED = re.compile(
    r"^LockedError: run\.dir=\S+ (belongs to job \d+, which is|is in use by process \d+)", re.M
)
END_S = 30.0


def main() -> None:
    """Run all rounds."""
    parser = argparse.ArgumentParser(prog="submission_races", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--submissions", type=int, default=10)
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    wrong = 0
    with (
        tempfile.TemporaryDirectory(prefix="races_") as folder,
        running_slurm(Path(folder) / "s", 1) as slurm,
    ):
        root = Path(folder)
        (root / "data").mkdir()
        (root / "data/dataset.json").touch()
        # Jobs stay in the queue: the partition starts none.
        slurm.ask("scontrol", "update", "PartitionName=main", "State=DOWN")
        for number in range(arguments.rounds):
            start_s, run = time.monotonic(), root / f"runs/{number}"
            if number % 2:
                start(slurm, root, run, "0.5").end()
                slurm.ask("scancel", f"--user={os.getuid()}")
            problems = one_round(slurm, root, run, arguments.submissions, counts)
            wrong += bool(problems)
            verdict = "; ".join(problems) or "one job, its own configuration"
            seconds = f"{time.monotonic() - start_s:.0f} s"
            print(f"round {number + 1:>2} of {arguments.rounds}, {seconds}: {verdict}", flush=True)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    print(
        f"{arguments.rounds - wrong} of {arguments.rounds} rounds ended in one job with its own configuration"
    )
    sys.exit(1 if wrong else 0)


def one_round(
    slurm: Slurm, folder: Path, run: Path, num_submissions: int, counts: "collections.Counter[str]"
) -> Sequence[str]:
    """Submit a run several times at once; what is not as it should be."""
    rates = [f"{number + 1}e-3" for number in range(num_submissions)]
    started = [start(slurm, folder, run, rate) for rate in rates]
    ends = [child.end() for child in started]
    accepted = [index for index, (_, status) in enumerate(ends) if status == 0]
    refused = [printed for printed, status in ends if status == 2 and NAMED.search(printed)]
    counts.update({"accepted": len(accepted), "refused by name": len(refused)})
    problems = []
    if len(accepted) != 1:
        return [f"{len(accepted)} submissions were accepted", *(printed[-300:] for printed, _ in ends)]
    if len(refused) != num_submissions - 1:
        problems.append(f"{len(refused)} refused by name: {[printed[-300:] for printed, _ in ends]}")
    problems += problems_of_winner(slurm, run, rates[accepted[0]], ends[accepted[0]][0])
    problems += leftovers(slurm, run)
    slurm.ask("scancel", f"--user={os.getuid()}")
    return problems


@dataclass(frozen=True, slots=True)
class Child:
    """A submission in a process of its own, forked so that all are at the same point at the same time."""

    pid: int
    printed: Path

    def end(self) -> tuple[str, int]:
        """What it printed, and its exit status."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.printed.read_text(), status


def start(slurm: Slurm, folder: Path, run: Path, rate: str) -> Child:
    """One submission, as its command does it."""
    overrides = [
        "experiment=smoke", "cluster=local_slurm", "cluster.nodes=1", "cluster.gpus_per_node=1",
        "parallelism=serial", f"data.dir={folder}/data", f"run.dir={run}", f"optim.lr={rate}",
    ]  # fmt: skip
    printed = folder / f"printed_{rate}"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, printed)
    os.environ.update(slurm.env)
    os.chdir(REPO)
    sys.argv = ["k25-submit", *overrides]
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    status = entry.FAULT
    try:
        launch.slurm.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def problems_of_winner(slurm: Slurm, run: Path, rate: str, printed: str) -> list[str]:
    """What is wrong with the one job, or with the files of its submission."""
    match = re.search(r"submitted job (\d+)", printed)
    queued = slurm.ask("squeue", "--noheader", "--format=%A|%o").split("\n")
    jobs = dict(line.split("|", 1) for line in queued if line)
    holder, token = lock.current(run), Submission.read(run).token
    found = []
    if match is None or list(jobs) != [match[1]]:
        found.append(f"the queue has the jobs {sorted(jobs)}, told was {printed[-300:]!r}")
    if holder is None or match is None or holder.job_id != int(match[1]):
        found.append(f"the lock is of {holder}")
    if load(run / CONFIG).config.optim.lr != float(rate):
        found.append(f"{CONFIG} is not of the accepted submission (optim.lr={rate})")
    if not token or any(token not in command for command in jobs.values()):
        found.append(f"{FACTS} is not of the job")
    if match is not None:
        slurm.ask("scontrol", "write", "batch_script", match[1], str(run.parent / "script"))
        # SLURM ends what it writes with a zero or without the last newline, by version.
        queued_script = (run.parent / "script").read_text().strip("\0\n")
        if queued_script != (run / SCRIPT).read_text().strip("\n"):
            found.append(f"{SCRIPT} is not the job's script")
    return found


def leftovers(slurm: Slurm, run: Path) -> list[str]:
    """What is left apart from the accepted submission."""
    deadline = time.monotonic() + END_S
    while (processes := slurm.processes(str(run))) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [f"processes {processes} are left"] if processes else []
    names = sorted(path.name for path in run.iterdir())
    if names != sorted([CONFIG, FACTS, SCRIPT, "lock.json"]):
        found.append(f"the folder has {names}")
    return found


if __name__ == "__main__":
    main()
