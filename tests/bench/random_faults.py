"""Seeded random faults over small runs: each ends as the uninterrupted run, or in an error with its cause.

    python -m tests.bench.random_faults [--count 300] [--seed 0] [--jobs 2] [--only KIND] [--verbose]

Trial number i has the seed `--seed` + i. Prints counts by kind and outcome, and for every violation what was
wrong and the command that repeats it; ends with status 1 if there was any.
"""

from __future__ import annotations

import argparse
import random
import shutil
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

from tests.helpers.faults.kinds import KINDS
from tests.helpers.faults.plans import Plan
from tests.helpers.faults.scenes import LAYOUTS, World
from tests.helpers.faults.trial import run_trial
from tests.helpers.trial_table import table_of

VIOLATION = "violation"
MAX_OUTPUT_LINES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What became of the trial of one seed."""

    seed: int
    kind: str
    text: str
    """The fault in words."""
    way: str
    """How the job with the fault ended."""
    problems: Sequence[str]
    """What was not right; empty if all was."""
    output: str
    """What the jobs printed."""
    seconds: float

    @property
    def outcome(self) -> str:
        """The column that it counts in."""
        return VIOLATION if self.problems else self.way


def plan_of(seed: int, world: World, only: str | None = None) -> Plan:
    """The fault of a seed."""
    rng = random.Random(seed)
    drawn = rng.choices(list(KINDS), weights=[kind.weight for kind in KINDS.values()])[0]
    return KINDS[only or drawn].draw(rng, world)


def record_of(seed: int, folder: Path, only: str | None) -> Record:
    """Run the trial of a seed in a folder below `folder`, which is removed."""
    started = time.monotonic()
    world, place = World(folder), folder / f"trial_{seed}"
    plan = plan_of(seed, world, only)
    way, problems, output = "", ["the bench itself failed"], ""
    try:
        verdict = run_trial(world, plan, place)
        way, problems, output = verdict.way, list(verdict.problems), verdict.output
    except Exception:
        output = traceback.format_exc()
        problems += output.splitlines()[-1:]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Record(
        seed=seed,
        kind=plan.kind,
        text=f"{plan.text}; {plan.layout}, from step {plan.started_at}",
        way=way,
        problems=problems,
        output=output,
        seconds=time.monotonic() - started,
    )


def records_of(seeds: range, folder: Path, only: str | None, num_jobs: int) -> Iterator[Record]:
    """The records of all seeds as they come; each of `num_jobs` processes works on one at a time."""
    with ProcessPoolExecutor(num_jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(record_of, seed, folder, only) for seed in seeds]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # After Ctrl-C, trials that have not begun are left out.
            pool.shutdown(cancel_futures=True)


def lines_of(record: Record, only: str | None, *, verbose: bool) -> Iterator[str]:
    """What is printed of a trial: nothing if all was right, unless `verbose`."""
    if not (verbose or record.problems):
        return
    what = record.outcome.upper() if record.problems else record.outcome
    yield f"seed {record.seed}: {record.kind}: {record.text}: {what}, {record.seconds:.1f} s"
    yield from (f"    {problem}" for problem in record.problems)
    if record.problems:
        option = f" --only {only}" if only else ""
        yield f"    python -m tests.bench.random_faults --count 1 --seed {record.seed}{option} --verbose"
        if verbose:
            yield from record.output.splitlines()[-MAX_OUTPUT_LINES:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.random_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    started = time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    violations = []
    with tempfile.TemporaryDirectory(prefix="k25_faults_") as folder:
        World(Path(folder)).build(list(LAYOUTS))
        seeds = range(options.seed, options.seed + options.count)
        for record in records_of(seeds, Path(folder), options.only, options.jobs):
            counts[record.kind, record.outcome] += 1
            violations += [record.seed] * bool(record.problems)
            for line in lines_of(record, options.only, verbose=options.verbose):
                console.print(line)
    console.print(table_of(counts, "fault"))
    minutes = (time.monotonic() - started) / 60
    seeds_text = f": seeds {', '.join(map(str, sorted(violations)))}" if violations else ""
    console.print(f"{options.count} faults in {minutes:.1f} min, {len(violations)} violations{seeds_text}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
