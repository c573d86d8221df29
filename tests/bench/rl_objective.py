"""How far the objective is from the printed equation, and layouts from one process, next to 1e-6.

`python -m tests.bench.rl_objective`: random groups, masks, branches, versions and packings through step files
in splits over 1, 2 and 4 replicas and over ranks that share sequences, against a float64 reference of 40
lines; then a tiny model over real ranks, with images and next-token sequences. Ten minutes on two cores;
`--quick` leaves out most of the ranks. Ends with 1 where a bar is missed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from k25_train.config.algorithm import OtherVersions
from tests.helpers.equation_trials import LAYOUTS, TOLERANCE, Trials
from tests.helpers.policy_runs import CASES, PTX, SERIAL, PolicyRuns
from tests.helpers.tiny_shards import write_tiny_shard_set


def main() -> int:
    """Print both figures; 1 if one of them is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="step files held against the equation")
    parser.add_argument("--quick", action="store_true", help="one layout over ranks instead of all")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        of_loss, of_gradient = against_equation(Path(folder) / "trials", chosen.trials)
        of_layouts = over_ranks(Path(folder), quick=chosen.quick)
    worst = max(of_loss, of_gradient, of_layouts)
    print(f"{chosen.trials} step files against the equation: loss {of_loss:.2e}, gradient {of_gradient:.2e}")
    print(f"layouts against one process: {of_layouts:.2e}")
    print(f"worst error {worst:.2e}, bar {TOLERANCE:.0e}: {'kept' if worst <= TOLERANCE else 'MISSED'}")
    return int(worst > TOLERANCE)


def against_equation(folder: Path, num_trials: int) -> tuple[float, float]:
    """Worst error of the loss, in nats, and of the gradient, relative, of random step files."""
    trials = Trials(folder)
    worst = (0.0, 0.0)
    for seed in range(num_trials):
        draw = np.random.default_rng(seed)
        rollouts = trials.rollouts(
            seed,
            sizes=draw.integers(2, 9, int(draw.integers(1, 7))).tolist(),
            num_images=int(draw.integers(0, 3)),
            longest=int(draw.integers(4, 40)),
        )
        config = trials.config(seed % len(LAYOUTS), int(draw.choice([1, 2, 4])))
        found = trials.errors(
            config,
            rollouts,
            seed,
            normalize=bool(draw.integers(0, 2)),
            other_versions=list(OtherVersions)[seed % 3],
            current_version=1,
            skip_equal_rewards=bool(draw.integers(0, 2)),
        )
        worst = max(worst[0], found[0]), max(worst[1], found[1])
    return worst


def over_ranks(folder: Path, *, quick: bool) -> float:
    """Worst difference of a loss or a gradient norm of any layout from one process."""
    runs = PolicyRuns(write_tiny_shard_set(folder / "data"), folder / "run", num_steps=4)
    worst = 0.0
    for more in ((), PTX):
        expected = runs.of(SERIAL, *more)
        for case in CASES[:1] if quick else CASES:
            found = runs.of(case, *more).difference(expected)
            print(f"{case.name} {' '.join(more)}: {found:.2e}", flush=True)
            worst = max(worst, found)
    return worst


if __name__ == "__main__":
    sys.exit(main())
