"""Where the time of a step goes, row by row, on the ranks of the stage that computes the longest; torch-free.

The first row is what the model needs: its FLOPs at `cluster.model_tflops`. The others are what the step takes
in addition. Nothing is measured on a GPU: every row is computed from the plan, with rates of data sheets.

Rows that are `in_rate` are shown, but not added: a rate at which such a model is known to train has them in
it. The one published for an architecture like ours, 386.6 TFLOP/s for Moonlight-16B-A3B on 16 H100 (NVIDIA's
Megatron-Bridge, July 2026), is of whole steps with fused permutation and router and with HybridEP, which
takes SMs. What a configuration pays more than that, without fused kernels or with NCCL's all-to-all, is
added.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.time.budget_of_layers import exchange_rows, layer_rows, saving_rows
from k25_train.plan.time.budget_of_step import HOST_WORK_S, encoder_row, optimizer_row, replica_rows
from k25_train.plan.time.budget_row import BudgetRow
from k25_train.plan.time.step import StepTimes, step_times


@dataclass(frozen=True)
class StepBudget:
    """The time of a step."""

    pipeline: PipelinePlan
    """The plan of the step."""

    @cached_property
    def times(self) -> StepTimes:
        """Passes without images."""
        return step_times(self.pipeline)

    @cached_property
    def stage(self) -> StagePlan:
        """The stage that computes the longest."""
        return max(self.pipeline.stages, key=self._computes_s)

    @cached_property
    def model_s(self) -> float:
        """Seconds of the model's FLOPs on a rank of that stage."""
        return self._computes_s(self.stage)

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

    def _rows(self) -> Iterator[BudgetRow]:
        bubbles_s = self.times.text.makespan_s - self.model_s
        yield BudgetRow("pipeline's idle time", bubbles_s, "simulated schedule, less the stage's passes")
        yield from exchange_rows(self.pipeline, self.stage)
        yield from layer_rows(self.stage)
        yield from saving_rows(self.stage)
        yield optimizer_row(self.pipeline)
        yield from replica_rows(self.pipeline.config)
        yield encoder_row(self.times)
        yield BudgetRow("host between steps", HOST_WORK_S, "the bar of tests.bench.host_work")

    def _computes_s(self, stage: StagePlan) -> float:
        seconds = self.times.seconds
        chunks = range(stage.stage, len(seconds.forward_s), len(self.pipeline.stages))
        passes_s = sum(seconds.forward_s[chunk] + seconds.backward_s[chunk] for chunk in chunks)
        return passes_s * self.pipeline.num_micro_batches
