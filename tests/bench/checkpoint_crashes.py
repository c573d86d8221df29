"""A hundred crashes while checkpoints are saved, committed and pruned, in real processes.

    python -m tests.bench.checkpoint_crashes [--count 100] [--seed 0] [--only KIND] [--verbose]

After each, a start as a run makes it has to bring up a whole checkpoint, whose tensors are what the job of
that step wrote, or name the file that is broken. Trial number i has the seed `--seed` + i. Prints the trials
by kind and outcome and every violation; ends with status 1 if there was any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers.checkpoint_crashes.trials import KINDS, NAMED, WHOLE, can_mount, kinds, run_trial


def main() -> int:
    """Run the trials; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS), help="one kind")
    parser.add_argument("--verbose", action="store_true", help="a line per trial")
    options = parser.parse_args()
    started_s, outcomes = time.monotonic(), Counter[tuple[str, str]]()
    chosen = [options.only] * options.count if options.only else kinds(options.count)
    num_violations = 0
    with tempfile.TemporaryDirectory(prefix="k25_crashes_") as folder:
        if not can_mount(Path(folder) / "disk"):
            print("no right to mount: a file limit stands in for a full disk")
            chosen = ["file too large" if kind == "disk full" else kind for kind in chosen]
        for number, kind in enumerate(chosen):
            seed = options.seed + number
            trial = run_trial(kind, seed, Path(folder) / str(seed))
            outcomes[kind, trial.outcome] += 1
            num_violations += bool(trial.problems)
            if options.verbose or trial.problems:
                print(f"{seed}: {kind}, {trial.text}: {trial.outcome}", flush=True)
            for problem in trial.problems:
                print(f"    VIOLATION: {problem}", flush=True)
            if trial.problems:
                print(f"    again: --only '{kind}' --seed {seed} --count 1", flush=True)
    for kind in KINDS:
        counts = (f"{outcomes[kind, outcome]:3} {outcome}" for outcome in (WHOLE, NAMED))
        print(f"{kind:24}{'   '.join(counts)}")
    took_s = time.monotonic() - started_s
    print(f"{len(chosen)} crashes in {took_s:.0f} s, {num_violations} violations (bar: 0)")
    return 1 if num_violations else 0


if __name__ == "__main__":
    sys.exit(main())
