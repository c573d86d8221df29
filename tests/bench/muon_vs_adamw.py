"""Steps that MuonClip needs for the loss that AdamW reaches, both tuned over the same grid of learning rates.

    python -m tests.bench.muon_vs_adamw [STEPS]

Trains the smoke model on the smoke set: AdamW for STEPS (480), MuonClip for three quarters of them, the
schedule of the rate shortened alike, each with every rate of the grid; the held-out loss after the last step
decides. Prints both side by side, and draws the best run of each to runs/muon_vs_adamw.png. Bar:
MuonClip's is no higher.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import start_run

RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
SHARE = 0.75
"""Of AdamW's steps."""
PICTURE = Path("runs/muon_vs_adamw.png")


@dataclass(frozen=True, slots=True)
class Trained:
    """One run."""

    name: str
    rate: float
    losses: list[float]
    """Training loss of each step."""
    held_out: float
    """Mean loss of held-out tokens after the last step."""


def train_and_evaluate(context: RankContext, arguments: Sequence[str]) -> tuple[list[float], float]:
    """Training losses, and the held-out loss at the end."""
    from k25_train.training.evaluation import eval_sums
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        losses = [train_step(run, step).loss for step in range(1, run.config.train.steps + 1)]
        return losses, run.objective.loss(eval_sums(run, run.config.train.eval_sequences))


def trained(name: str, rate: float, steps: int) -> Trained:
    """The smoke experiment for `steps` steps, the last three eighths of them in the decay, on 2 ranks."""
    arguments = [
        "experiment=smoke", f"optim={name}", "parallelism=serial", "cluster.gpus_per_node=2",
        f"train.steps={steps}", f"optim.lr={rate}", f"optim.min_lr={rate / 25}",
        f"optim.decay={steps * 3 // 8}", "train.eval_sequences=64",
    ]  # fmt: skip
    losses, held_out = run_ranks(train_and_evaluate, 2, arguments, timeout_s=1800.0)[0]
    return Trained(name, rate, losses, held_out)


def main() -> None:
    """Train all, print the table, draw the picture."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 480
    short = round(steps * SHARE)
    console = Console()
    table = Table("optimizer", "steps", "rate", "last 10 training losses", "held-out loss")
    best: dict[str, Trained] = {}
    for name, num_steps in (("adamw", steps), ("muonclip", short)):
        for rate in RATES:
            run = trained(name, rate, num_steps)
            last = sum(run.losses[-10:]) / 10
            table.add_row(name, str(num_steps), f"{rate:g}", f"{last:.4f}", f"{run.held_out:.4f}")
            if name not in best or run.held_out < best[name].held_out:
                best[name] = run
            console.print(f"{name} {rate:g}: {run.held_out:.4f}")
    console.print(table)
    difference = best["muonclip"].held_out - best["adamw"].held_out
    console.print(
        f"best MuonClip after {short} steps - best AdamW after {steps}: {difference:+.4f} nats, bar <= 0"
    )
    draw(list(best.values()))
    console.print(f"curves: {PICTURE}")


def draw(runs: Sequence[Trained]) -> None:
    """Training losses over steps, smoothed over ten, with the held-out loss at the end."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for run in runs:
        smooth = [sum(run.losses[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(run.losses))]
        (line,) = axes.plot(range(1, len(smooth) + 1), smooth, label=f"{run.name}, rate {run.rate:g}")
        axes.plot(
            len(smooth), run.held_out, "o", color=line.get_color(), label=f"held-out {run.held_out:.3f}"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss in nats per token, mean of 10 steps")
    axes.set_title("Smoke model, each optimizer at its best rate of the grid")
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
