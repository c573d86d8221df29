"""Rows of a step's budget that occur once in it; torch-free."""

from collections.abc import Iterator

from k25_train.plan.assumptions import AS_CONFIGURED
from k25_train.plan.memory.pipeline_peak import rank_size
from k25_train.plan.optimizer import stage_parameters, stage_states
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.budget_row import BudgetRow, moved_s
from k25_train.plan.time.optimizer import slowest_optimizer
from k25_train.plan.time.step import StepTimes, flops_per_s
from k25_train.plan.weight_bytes import GRADIENT_BYTES
from parallel.config import DepSchedule
from parallel.pipeline.schedule import BACKWARD_COST

UPDATE_BYTES = 32
"""Bytes that are read and written for a weight that is updated: gradient for the norm and for momentum,
momentum, direction, update, master, and the weight in the model's type."""
HOST_WORK_S = 0.05
"""Work of the host between two steps, while the device waits: what `tests.bench.host_work` allows."""


def optimizer_rows(pipeline: PipelinePlan) -> Iterator[BudgetRow]:
    """The optimizer of the stage where it takes longest, and what it does to every weight."""
    config, times = pipeline.config, slowest_optimizer(pipeline)
    parts = {
        "state streamed": times.stream_s,
        "Newton-Schulz": times.newton_schulz_s,
        "matrices sent": times.exchange_s,
    }
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    yield BudgetRow(
        "optimizer", times.total_s, f"the longest of: {told}; and {times.edges_s:.2f} before, after"
    )
    # Gradients are cleared whole on each rank; norm and update go over the rank's share.
    held = max(sum(rank_size(config, each) for each in stage_parameters(stage)) for stage in pipeline.stages)
    updated = max(sum(state.num_weights.values()) for state in stage_states(pipeline)) / config.dp
    seconds = moved_s(GRADIENT_BYTES * held + UPDATE_BYTES * updated)
    yield BudgetRow("gradients cleared, weights updated", seconds, "elementwise, by bytes")


def encoder_row(times: StepTimes, idle_s: float) -> BudgetRow:
    """A decoupled encoder runs forward a second time, and sends features; its own FLOPs are the model's.

    Args:
        idle_s: the pipeline's idle time, which takes up what it can with `dep.schedule=bubbles`.
    """
    config, what = times.config, "encoder's second forward, exchange"
    if not config.vision_placement.encoder_parts:
        return BudgetRow(what, 0.0, "coupled")
    share = AS_CONFIGURED.vision_share
    tokens = share * config.train.global_batch_size * config.train.seq_len
    patches = tokens * config.model.vision.merge_size**2
    again = times.cost.per_patch * patches + times.cost.per_token * tokens
    again_s = again / config.world_size / flops_per_s(config)
    # Features and their gradients leave all ranks; each first stage receives its replica's.
    sent_s = 2 * times.exchange_s(int(tokens / config.dp))
    told = "nothing of it in idle time"
    if config.dep.schedule is DepSchedule.bubbles:
        # The first forward and the backward pass need idle time, too.
        again_s = max(0.0, again_s + sent_s - max(0.0, idle_s - (1 + BACKWARD_COST) * again_s))
        sent_s, told = 0.0, "as much as fits in idle time"
    seconds = again_s + sent_s + times.gather_s + times.reduce_s
    return BudgetRow(what, seconds, f"{share:.0%} vision tokens, {told}")
