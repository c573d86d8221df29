"""Reinforcement learning that is killed at 200 random moments and goes on each time.

    python -m tests.bench.rl_crashes [--crashes 200] [--training 20] [--engines 40] [--served 20] [--seed 0]
                                     [--dir FOLDER]

Runs are killed (SIGKILL) again and again until they are done: synchronous ones, of two steps a phase, of
partial responses and asynchronous ones. Three parts, whose kills together are `--crashes`:

    training   `--training` kills of runs that train a shrunk model
    served     `--served` kills of loops whose engines are two processes behind HTTP, and `--engines` kills of
               these: in the middle of generating, a pause, staging, a commit, or at any moment; they are
               started again at the same port, without weights
    loop       the others, of loops with an engine in the same process; in one of ten jobs it fails for good

In the last two a trainer hashes what it is given instead. Afterwards every group was trained exactly once,
no token that a journal had is missing, and the final weights are those of a run that was never killed, to the
bit (asynchronous runs, which depend on time, apart). All tokens that loops have trained are drawn again, from
the weights that their version says. Prints the figure last; ends with status 1 if anything is violated.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers.rl_crashes import CrashingRun, start_server
from tests.helpers.rl_runs import rl_overrides, write_rl_data
from tests.helpers.rl_served_runs import ServedRun, wrong_tokens

STEPS, PER_STEP, SIZE = 12, 2, 3
KINDS: dict[str, list[str]] = {
    "synchronous": [],
    "two steps a phase": ["algorithm.steps_per_rollout=2"],
    "partial": ["algorithm.token_cap=3"],
    "asynchronous": ["algorithm.max_staleness=2"],
}
KILLS_PER_RUN = {"loop": 20, "training": 20, "served": 5}
DEATHS_PER_RUN = 10
LIVES = {"loop": 0.5, "training": 0.5, "served": 2.0}
"""Longest life of a job, in times that of one which is never killed; over HTTP everything takes longer."""


def main() -> int:
    """Kill as many as were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--crashes", type=int, default=200)
    parser.add_argument("--training", type=int, default=20)
    parser.add_argument("--engines", type=int, default=40)
    parser.add_argument("--served", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    parts = options.training + options.engines + options.served
    with tempfile.TemporaryDirectory(prefix="k25_rl_crashes_") as scratch:
        trials = Trials(options.dir or Path(scratch), random.Random(options.seed))
        trials.part("served", options.served, options.engines)
        trials.part("loop", options.crashes - parts, 0)
        trials.part("training", options.training, 0)
    print(trials.summary())
    return 1 if trials.violations or trials.kills + trials.engines < options.crashes else 0


class Trials:
    """Runs that are killed, part by part."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.data, self.started = write_rl_data(folder / "data"), time.monotonic()
        self.kills = self.ends = self.violations = 0
        self.deaths: Counter[str] = Counter()
        """Engines that were killed, by what they were doing."""
        self.references: dict[str, tuple[CrashingRun, float]] = {}
        start_server()

    @property
    def engines(self) -> int:
        """Engines that were killed."""
        return self.deaths.total()

    def part(self, part: str, kills: int, engines: int) -> None:
        """Kill so many jobs of a part, and so many of its engines."""
        wanted, number = (self.kills + kills, self.engines + engines), 0
        while self.kills < wanted[0] or self.engines < wanted[1]:
            kind = list(KINDS)[number % (1 if part == "training" else len(KINDS))]
            name = f"{part} {kind} {number}".replace(" ", "_")
            most = min(KILLS_PER_RUN[part], wanted[0] - self.kills)
            deaths = min(DEATHS_PER_RUN, wanted[1] - self.engines)
            run = self.run(name, kind, part, deaths)
            try:
                reference, life_s = self.reference(part == "training", kind)
                run.killed_to_the_end(self.rng, LIVES[part] * life_s, most)
            finally:
                run.close()
            self.judge(name, run, None if kind == "asynchronous" else reference)
            number += 1

    def run(self, name: str, kind: str, part: str, deaths: int) -> CrashingRun:
        """A run that nothing has happened to."""
        path = self.folder / name
        settings = rl_overrides(self.data, path, f"train.steps={STEPS}", *KINDS[kind])
        if part == "served":
            return ServedRun(path, settings, trains=False, rng=self.rng, most_deaths=deaths)
        return CrashingRun(path, settings, trains=part == "training")

    def reference(self, trains: bool, kind: str) -> tuple[CrashingRun, float]:
        """The run that is never killed, with an engine in the same process, and the seconds that it took."""
        name = f"whole {trains} {kind}".replace(" ", "_")
        if name not in self.references:
            run = self.run(name, kind, "training" if trains else "loop", 0)
            self.references[name] = run, run.to_the_end()
        return self.references[name]

    def judge(self, name: str, run: CrashingRun, reference: CrashingRun | None) -> None:
        """See what a finished run has done, and count it."""
        found = run.check(reference, STEPS, PER_STEP, SIZE)
        found += [] if run.trains else wrong_tokens(run, STEPS)
        killed = run.servers.deaths if isinstance(run, ServedRun) else []
        print(f"{name}: {run.num_kills} kills, {len(killed)} of engines ({run.num_deaths} ends)", flush=True)
        for problem in found:
            print(f"    VIOLATION: {problem}", flush=True)
        self.kills, self.ends = self.kills + run.num_kills, self.ends + run.num_deaths
        self.violations += len(found)
        self.deaths.update(killed)

    def summary(self) -> str:
        """What all of it came to."""
        moments = ", ".join(f"{count} in {call}" for call, count in sorted(self.deaths.items()))
        return (
            f"engines were killed in {moments.replace('in any', 'at any moment') or 'no call'}; {self.ends} "
            "jobs ended by themselves, with the engines' names\n"
            f"{self.kills + self.engines} kills, {self.engines} of them of engines, in "
            f"{time.monotonic() - self.started:.0f} s: {self.violations} violations (bar: 0)"
        )


if __name__ == "__main__":
    sys.exit(main())
