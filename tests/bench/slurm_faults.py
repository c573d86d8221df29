"""Seeded random disturbances of a running job on a real SLURM of three nodes, which this host pretends to be.

    python -m tests.bench.slurm_faults [--count 40] [--seed 0] [--jobs 1] [--only KIND] [--keep FOLDER]

Trial number i has the seed `--seed` + i. Each run has to recover alone, or to end in a named state that one
`sbatch` continues; its loss curve has to be the undisturbed run's; no node but the disturbed one may be left
out, and nothing may be left behind. Prints a line for each, then counts; ends with status 1 if anything was
wrong.

As root, each cluster gets a /dev/shm of its own, so that what is left there is seen; otherwise it is not
looked at, and disturbances that mount file systems are skipped.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from tests.helpers.slurm_cluster import end_with_parent, require_slurm
from tests.helpers.slurm_faults.kinds import KINDS, plan_of
from tests.helpers.slurm_faults.plans import STARTING
from tests.helpers.slurm_faults.site import Site, World
from tests.helpers.slurm_faults.trial import Verdict, run_trial
from tests.helpers.trial_table import table_of

VIOLATION, SKIPPED = "violation", "skipped"
MAX_OUTPUT_LINES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What became of the trial of one seed."""

    seed: int
    kind: str
    text: str
    """The disturbance in words."""
    when: str
    recovered: str
    steps_lost: int
    is_told: bool
    """Whether all that had to be told was."""
    problems: Sequence[str]
    """What was not right; empty if all was."""
    history: Sequence[str]
    """The attempts in words."""
    log: str
    seconds: float

    @property
    def outcome(self) -> str:
        """The column that it counts in."""
        return VIOLATION if self.problems else self.recovered.partition(",")[0]


_sites: dict[Path, Site] = {}
"""The cluster of this worker process, which its trials share."""


def record_of(seed: int, folder: Path, only: str | None, keep: Path | None) -> Record:
    """Run the trial of a seed in a folder below `folder`, which is removed."""
    started = time.monotonic()
    kind, plan = plan_of(seed, only)
    world, place = World(folder), folder / f"t{seed}"
    when = "start" if plan.step == STARTING else f"step {plan.step}"
    if plan.small_disk and os.geteuid() != 0:
        verdict = Verdict(problems=(), recovered=SKIPPED, steps_lost=0, evidence=None, log="")
    else:
        try:
            if folder not in _sites:
                _sites[folder] = Site(folder / f"w{os.getpid()}")
                atexit.register(_sites[folder].close)
            keep_in = None if keep is None else keep / f"seed_{seed}"
            verdict = run_trial(_sites[folder], world, plan, place, keep_in)
        except Exception as error:
            problems = [f"the bench itself failed: {error!r:.300}"]
            log = traceback.format_exc()
            verdict = Verdict(problems=problems, recovered="?", steps_lost=0, evidence=None, log=log)
    shutil.rmtree(place, ignore_errors=True)
    attempts = verdict.evidence.attempts if verdict.evidence else []
    return Record(
        seed=seed,
        kind=kind,
        text=plan.text,
        when=when,
        recovered=verdict.recovered,
        steps_lost=verdict.steps_lost,
        is_told=not any(problem.startswith("not told") for problem in verdict.problems),
        problems=verdict.problems,
        history=[
            f"attempt {attempt.number} on {', '.join(attempt.nodes)}: {attempt.outcome}: {attempt.reason}"
            for attempt in attempts
        ],
        log=verdict.log,
        seconds=time.monotonic() - started,
    )


def prepare_worker() -> None:
    """End with the cluster if the bench ends, in the middle of a trial."""

    def end(*_: object) -> None:
        # An exception would only end the trial.
        for site in _sites.values():
            site.close()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    end_with_parent()


def records_of(
    seeds: range, folder: Path, only: str | None, num_jobs: int, keep: Path | None
) -> Iterator[Record]:
    """The records of all seeds as they come; each of `num_jobs` processes has a cluster of its own."""
    context = get_context("spawn")
    with ProcessPoolExecutor(num_jobs, mp_context=context, initializer=prepare_worker) as pool:
        futures = [pool.submit(record_of, seed, folder, only, keep) for seed in seeds]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            # After Ctrl-C, trials that have not begun are left out; otherwise workers close their clusters.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def lines_of(record: Record, only: str | None, *, verbose: bool) -> Iterator[str]:
    """What is printed of a trial."""
    told = "told" if record.is_told else "NOT told"
    end = VIOLATION.upper() if record.problems else "nothing left"
    yield (
        f"seed {record.seed}: {record.kind}: {record.text}: at {record.when}: {told}, "
        f"{record.steps_lost} steps lost, recovered {record.recovered}, {end}, {record.seconds:.0f} s"
    )
    yield from (f"    {problem}" for problem in record.problems)
    if record.problems or verbose:
        yield from (f"    | {text}" for text in record.history)
    if record.problems:
        option = f" --only '{only}'" if only else ""
        yield f"    python -m tests.bench.slurm_faults --count 1 --seed {record.seed}{option} --verbose"
        if verbose:
            yield from record.log.splitlines()[-MAX_OUTPUT_LINES:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.slurm_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--keep", type=Path, help="where to copy run folders in which something was wrong")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    require_slurm()
    console = Console(soft_wrap=True, markup=False, highlight=False)
    started = time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    violations = []
    with tempfile.TemporaryDirectory(prefix="slurm_faults_", ignore_cleanup_errors=True) as folder:
        World(Path(folder)).build()
        seeds = range(options.seed, options.seed + options.count)
        for record in records_of(seeds, Path(folder), options.only, options.jobs, options.keep):
            counts[record.kind, record.outcome] += 1
            violations += [record.seed] * bool(record.problems)
            for line in lines_of(record, options.only, verbose=options.verbose):
                console.print(line)
    console.print(table_of(counts, "disturbance"))
    minutes = (time.monotonic() - started) / 60
    seeds_text = f": seeds {', '.join(map(str, sorted(violations)))}" if violations else ""
    console.print(
        f"{options.count} disturbances in {minutes:.1f} min, {len(violations)} violations{seeds_text}"
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
