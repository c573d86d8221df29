"""Reinforcement learning that is killed at 200 random moments and goes on each time.

    python -m tests.bench.rl_crashes [--crashes 200] [--training 20] [--seed 0] [--dir FOLDER]

Runs are killed (SIGKILL) again and again until they are done: synchronous ones, of two steps a phase, of
partial responses and asynchronous ones; `--training` of the kills are of runs that train a shrunk model, the
others of the loop with a trainer that hashes what it is given. In one of ten jobs it is the engine that dies
instead. Afterwards every group was trained exactly once, no token that a journal had is missing, and the
final weights are those of a run that was never killed, to the bit (asynchronous runs, which depend on time,
apart). Prints the figure last; ends with status 1 if anything is violated.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.rl_crashes import CrashingRun, start_server
from tests.helpers.rl_runs import rl_overrides, write_rl_data

STEPS, PER_STEP, SIZE = 12, 2, 3
KINDS: dict[str, list[str]] = {
    "synchronous": [],
    "two steps a phase": ["algorithm.steps_per_rollout=2"],
    "partial": ["algorithm.token_cap=3"],
    "asynchronous": ["algorithm.max_staleness=2"],
}
KILLS_PER_RUN = 20


def main() -> int:
    """Kill as many as were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--crashes", type=int, default=200)
    parser.add_argument("--training", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="k25_rl_crashes_") as scratch:
        return crash(options.dir or Path(scratch), options.crashes, options.training, options.seed)


def crash(folder: Path, num_crashes: int, num_training: int, seed: int) -> int:
    """Run the trials in a folder; the exit status."""
    data, started = write_rl_data(folder / "data"), time.monotonic()
    rng = random.Random(seed)
    start_server()
    kills = deaths = violations = 0
    for trains, wanted in ((False, num_crashes - num_training), (True, num_training)):
        references: dict[str, tuple[CrashingRun, float]] = {}
        done = number = 0
        while done < wanted:
            kind = list(KINDS)[number % (1 if trains else len(KINDS))]
            name = f"{'training' if trains else 'loop'} {kind}".replace(" ", "_").replace(",", "")
            if kind not in references:
                path = folder / f"{name}_whole"
                reference = CrashingRun(path, _settings(data, path, kind), trains)
                references[kind] = reference, reference.to_the_end()
            reference, life_s = references[kind]
            path = folder / f"{name}_{number}"
            run = CrashingRun(path, _settings(data, path, kind), trains)
            most = min(KILLS_PER_RUN, wanted - done)
            run.killed_to_the_end(rng, life_s / 2, most)
            found = run.check(None if kind == "asynchronous" else reference, STEPS, PER_STEP, SIZE)
            print(f"{name} {number}: {run.num_kills} kills, {run.num_deaths} engines died", flush=True)
            for problem in found:
                print(f"    VIOLATION: {problem}", flush=True)
            done, number, violations = done + run.num_kills, number + 1, violations + len(found)
            deaths += run.num_deaths
        kills += done
    took = time.monotonic() - started
    print(f"{kills} kills and {deaths} dead engines in {took:.0f} s: {violations} violations (bar: 0)")
    return 1 if violations or kills < num_crashes else 0


def _settings(data: Path, run: Path, kind: str) -> list[str]:
    return rl_overrides(data, run, f"train.steps={STEPS}", *KINDS[kind])


if __name__ == "__main__":
    sys.exit(main())
