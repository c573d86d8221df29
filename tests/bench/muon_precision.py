"""What bfloat16 in Newton-Schulz and in the exchange of matrices changes, on the smoke model and set.

    python -m tests.bench.muon_precision [STEPS]

Trains twice on 2 ranks for STEPS (120), the learning rate and batches alike: with
`optim.muon.{newton_schulz_dtype,exchange_dtype}` of float32, and of bfloat16 as in
`experiment=k25_pretrain_4k`. In the last step of the first run every batch of matrices is orthogonalised both
ways, its directions rounded as they travel. On the CPU, as on a GPU, the products' operands are bfloat16.

Bars: held-out losses differ by less than 1%, updates by less than 3% in norm. Ends with 1 above a bar.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import start_run

LOSS_BAR = 0.01
UPDATE_BAR = 0.03
DTYPES = ("float32", "bfloat16")
Difference = tuple[tuple[int, int], float]
"""Shape of matrices, and by how much their updates differ, relative to their norm."""


def train_and_compare(
    context: RankContext, arguments: Sequence[str]
) -> tuple[list[float], float, list[Difference]]:
    """Training losses, held-out loss at the end, and differences of the last step's updates."""
    from k25_train.training.evaluation import eval_sums
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    num_steps, found = run.config.train.steps, list[Difference]()
    with run.data:
        losses = [train_step(run, step).loss for step in range(1, num_steps)]
        for part in run.optimizer.chained_optimizers:
            if hasattr(part.optimizer, "_orthogonalize"):
                part.optimizer._orthogonalize = partial(_both_ways, part.optimizer, found)
        losses.append(train_step(run, num_steps).loss)
        return losses, run.objective.loss(eval_sums(run, run.config.train.eval_sequences)), found


def _both_ways(muon: object, found: list[Difference], matrices: Tensor) -> Tensor:
    """The updates, after noting by how much those in bfloat16 differ."""
    from k25_train.config.basics import DType

    orthogonalize, settings = type(muon)._orthogonalize, muon.settings  # type: ignore[attr-defined]
    chosen = settings.newton_schulz_dtype
    rounded = matrices.to(torch.bfloat16).float()
    settings.newton_schulz_dtype = DType.bfloat16
    coarse = orthogonalize(muon, rounded).to(torch.bfloat16).float()
    settings.newton_schulz_dtype = DType.float32
    exact = orthogonalize(muon, matrices.clone())
    settings.newton_schulz_dtype = chosen
    errors = (coarse - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp_min(1e-30)
    found += [((matrices.shape[1], matrices.shape[2]), error) for error in errors.tolist()]
    return orthogonalize(muon, matrices)  # type: ignore[no-any-return]


def main() -> int:
    """Train both, print the tables and the figures against their bars."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    console, results = Console(), {}
    table = Table("format", "first losses", "last ten losses", "held-out loss")
    for dtype in DTYPES:
        arguments = [
            "experiment=smoke", "optim=muonclip", "parallelism=serial", "cluster.gpus_per_node=2",
            f"train.steps={steps}", f"optim.decay={steps * 3 // 8}", "train.eval_sequences=64",
            f"optim.muon.newton_schulz_dtype={dtype}", f"optim.muon.exchange_dtype={dtype}",
        ]  # fmt: skip
        arguments.append(f"optim.warmup={max(1, steps // 10)}")
        by_rank = run_ranks(train_and_compare, 2, arguments, timeout_s=3600.0)
        losses, held_out, _ = results[dtype] = by_rank[0]
        table.add_row(dtype, f"{losses[0]:.4f}", f"{sum(losses[-10:]) / 10:.4f}", f"{held_out:.4f}")
        if dtype == "float32":
            differences = [each for _, _, found in by_rank for each in found]
    console.print(table)
    shapes = Table("matrices", "number", "mean difference of updates", "largest")
    for shape in sorted({shape for shape, _ in differences}):
        errors = [error for other, error in differences if other == shape]
        mean = sum(errors) / len(errors)
        shapes.add_row(f"{shape[0]} x {shape[1]}", str(len(errors)), f"{mean:.2%}", f"{max(errors):.2%}")
    console.print(shapes)
    exact, coarse = (results[dtype][1] for dtype in DTYPES)
    loss, update = abs(coarse / exact - 1), sum(error for _, error in differences) / len(differences)
    console.print(
        f"after {steps} steps held-out losses differ by {loss:.3%}, bar {LOSS_BAR:.0%}; updates differ by "
        f"{update:.2%} in the mean, bar {UPDATE_BAR:.0%}"
    )
    return int(loss >= LOSS_BAR or update >= UPDATE_BAR)


if __name__ == "__main__":
    sys.exit(main())
