"""What FP8 storage does to training: loss curves of `activation=k2` and `keep` side by side.

    python -m tests.bench.activation_loss [STEPS] [SEEDS]    # prints tables, draws runs/activation_loss.png

Trains the smoke model with MuonClip on the smoke set for STEPS (300) steps on 2 ranks: with everything kept,
with `activation=k2`, and with everything kept as two pipeline stages, which differs from the first run by the
rounding of float32 alone. Bar: the curve of `k2` stays within 0.5% of that of `keep`. A curve is the mean
loss of the last ten steps; differences of single steps are printed as well. Runs that differ in one rounding
are soon as far apart as any two, so the mean over SEEDS (3) tells more than one seed does; both are printed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import layout, train

PICTURE = Path("runs/activation_loss.png")
BAR = 0.005
WINDOW = 10
FIRST_SEED = 1234
RUNS = {
    "keep": [*layout(dp=2), "activation=keep"],
    "k2": [*layout(dp=2), "activation=k2"],
    "keep, two stages": [*layout(pp=2), "activation=keep"],
}


def losses(steps: int, seed: int, more: Sequence[str]) -> list[float]:
    """Training losses of the smoke experiment, the last three eighths of the steps in the decay."""
    arguments = ["experiment=smoke", f"train.steps={steps}", f"optim.decay={steps * 3 // 8}"]
    arguments += [f"train.seed={seed}", *more]
    return [loss for loss, _ in run_ranks(train, 2, arguments, timeout_s=3600.0)[0]]


def smooth(curve: Sequence[float]) -> list[float]:
    """Mean of the last ten steps, from the tenth on."""
    return [sum(curve[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(curve) + 1)]


def largest_difference(curve: Sequence[float], reference: Sequence[float]) -> float:
    """Relative."""
    return max(abs(loss / exact - 1) for loss, exact in zip(curve, reference, strict=True))


def main() -> None:
    """Train, print, draw."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    num_seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    console = Console()
    by_seed = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        curves = {name: losses(steps, seed, more) for name, more in RUNS.items()}
        by_seed.append(curves)
        console.print(table(f"seed {seed}", curves))
    mean = {
        name: [statistics.fmean(each) for each in zip(*(curves[name] for curves in by_seed), strict=True)]
        for name in RUNS
    }
    console.print(table(f"mean of {num_seeds} seeds", mean))
    draw(mean)
    console.print(f"curves: {PICTURE}")


def table(title: str, curves: Mapping[str, Sequence[float]]) -> Table:
    """How far each curve is from that of `keep`."""
    keep = curves["keep"]
    found = Table("run", "last 10 steps", f"curve against keep (bar {BAR:.1%})", "single steps", title=title)
    for name, curve in curves.items():
        differences = (
            largest_difference(smooth(curve), smooth(keep)),
            largest_difference(curve, keep),
        )
        found.add_row(name, f"{smooth(curve)[-1]:.4f}", *(f"{each:.3%}" for each in differences))
    return found


def draw(curves: Mapping[str, Sequence[float]]) -> None:
    """The curves, and below them their distance from `keep`."""
    figure = Figure(figsize=(8, 7))
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    keep = smooth(curves["keep"])
    for name, curve in curves.items():
        line = smooth(curve)
        steps = range(WINDOW, len(curve) + 1)
        above.plot(steps, line, label=name, linewidth=1.2)
        if name != "keep":
            relative = [100 * (loss / exact - 1) for loss, exact in zip(line, keep, strict=True)]
            below.plot(steps, relative, label=name, color=above.lines[-1].get_color())
    for bound in (BAR, -BAR):
        below.axhline(100 * bound, color="gray", linestyle="--", linewidth=0.8)
    above.set_ylabel(f"loss in nats per token, mean of {WINDOW} steps")
    above.set_title("Smoke model with MuonClip: activations kept, and stored as in K2")
    below.set_ylabel("% against keep")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
