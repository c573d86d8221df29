"""Where the time of a step goes, row by row, on the ranks of the stage that computes the longest; torch-free.

The first row is what the model needs: its FLOPs at one rate, spread evenly over all ranks. The
others are what the step takes in addition. Nothing is measured on a GPU: every row is computed from the plan,
with rates of data sheets.

Rows that are `in_rate` are shown, but not added: a rate at which such a model is known to train has them in
it. The one published for an architecture like ours, 386.6 TFLOP/s for Moonlight-16B-A3B on 16 H100 (NVIDIA's
Megatron-Bridge, July 2026), is of whole steps with fused permutation and router and with HybridEP, which
takes SMs. What a configuration pays more than that, without fused kernels, with another dispatcher or over
more nodes, is added.

Two sums are told. `share` has every row. `code_share` has the rows of what this project's code does next to
the model's passes, which more tuning of kernels and host work can remove: the optimizer, gradients, host work
and kernels that are not fused. Left out of it is what the chosen layout and policies cost whatever the code:
the pipeline's idle time, exchanges that fill it, what is made again or stored in FP8, and SMs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.time.budget_of_layers import embedding_row, exchange_rows, layer_rows, saving_rows
from k25_train.plan.time.budget_of_schedule import ScheduleBudget
from k25_train.plan.time.budget_of_step import HOST_WORK_S, encoder_row, optimizer_rows
from k25_train.plan.time.budget_row import BudgetRow

OF_THE_LAYOUT = (
    "stages that compute less",
    "pipeline's idle time",
    "exchange, fill and drain",
    "experts' exchange, not hidden",
    "more SMs than HybridEP's",
    "recomputation",
    "FP8 storage",
    "offloading, not hidden",
)
"""Rows of what layout and policies cost."""


@dataclass(frozen=True)
class StepBudget:
    """The time of a step."""

    pipeline: PipelinePlan
    """The plan of the step."""

    @cached_property
    def schedule(self) -> ScheduleBudget:
        """When passes run."""
        return ScheduleBudget(self.pipeline)

    @property
    def stage(self) -> StagePlan:
        """The stage that computes the longest."""
        return self.schedule.stage

    @property
    def model_s(self) -> float:
        """Seconds of the model's FLOPs, spread evenly over all ranks."""
        return self.schedule.model_s

    @cached_property
    def rows(self) -> tuple[BudgetRow, ...]:
        """What the step takes in addition."""
        return tuple(self._rows())

    @property
    def rest_s(self) -> float:
        """Seconds of all rows that are not in the rate."""
        return sum(row.seconds for row in self.rows if not row.in_rate)

    @property
    def share(self) -> float:
        """The same over the model's FLOPs."""
        return self.rest_s / self.model_s

    @property
    def code_share(self) -> float:
        """Of those the rows that are not of layout and policies, over the model's FLOPs."""
        of_code = (row.seconds for row in self.rows if not row.in_rate and row.what not in OF_THE_LAYOUT)
        return sum(of_code) / self.model_s

    def _rows(self) -> Iterator[BudgetRow]:
        yield from self.schedule.rows()
        yield from exchange_rows(self.stage)
        yield from layer_rows(self.stage)
        yield embedding_row(self.stage)
        yield from saving_rows(self.stage)
        yield from optimizer_rows(self.pipeline)
        yield encoder_row(self.schedule.times, self.schedule.idle_s)
        yield BudgetRow("host between steps", HOST_WORK_S, "the bar of tests.bench.host_work")
