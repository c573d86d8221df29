"""What is added up over all ranks once in a step: one collective, for which the host waits once.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.objectives.base import NamedSums, total
from k25_train.training.expert_load import ExpertFigures
from k25_train.training.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Figures of one step over all ranks; the same on every rank."""

    sums: NamedSums
    """What the objective reports of the global batch."""
    experts: ExpertFigures
    """How evenly they were loaded."""
    weight_norms: Mapping[str, float]
    """Part of the model -> norm of the weights that the step began with; empty between two intervals."""


def step_totals(run: Run, step: int, reported: Sequence[Tensor]) -> StepTotals:
    """Add up what the last stages report of their micro-batches, experts' tokens and squares of weights.

    Called by every rank, after the schedule and before the update. Everything is float64: counts are exact.
    """
    # 1. Always of the same length, so that sums are added up in the same order in each step.
    names = run.objective.sum_names
    own = [
        total(reported, len(names), run.topology.device),
        run.expert_load.take(),
        run.weight_norms.squares(step),
    ]
    joined = torch.cat(own)
    dist.all_reduce(joined)
    sums, counts, squares = joined.split([len(each) for each in own])
    # 2. Counts of experts become a few figures per layer before the host asks for them.
    by_layer = run.expert_load.by_layer(counts)
    found = torch.cat([sums, by_layer, squares]).tolist()
    first, second = len(names), len(names) + len(by_layer)
    return StepTotals(
        sums=NamedSums(dict(zip(names, found[:first], strict=True))),
        experts=run.expert_load.figures(found[first:second]),
        weight_norms=run.weight_norms.norms(step, found[second:]),
    )


def losses_by_source(figures: Mapping[str, float]) -> dict[str, float]:
    """Source -> loss, of an objective's figures."""
    prefix = "loss/"
    return {name.removeprefix(prefix): loss for name, loss in figures.items() if name.startswith(prefix)}
