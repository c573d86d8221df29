"""Rows of a step's budget that occur once in it; torch-free."""

from collections.abc import Iterator

from k25_train.config.schema import Config
from k25_train.plan.pass_sizes import VISION_SHARE
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.budget_row import BudgetRow
from k25_train.plan.time.communication import communication
from k25_train.plan.time.optimizer import slowest_optimizer
from k25_train.plan.time.step import StepTimes, flops_per_s, network_bytes_per_s

HOST_WORK_S = 0.05
"""Work of the host between two steps, while the device waits: what `tests.bench.host_work` allows."""


def optimizer_row(pipeline: PipelinePlan) -> BudgetRow:
    """The longest of what runs concurrently on the slowest stage, and what comes before and after it."""
    times = slowest_optimizer(pipeline)
    parts = {
        "state streamed": times.stream_s,
        "Newton-Schulz": times.newton_schulz_s,
        "matrices sent": times.exchange_s,
    }
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    return BudgetRow("optimizer", times.total_s, f"the longest of: {told}; {times.edges_s:.2f} around it")


def replica_rows(config: Config) -> Iterator[BudgetRow]:
    """ZeRO-1: what is reduced after the last pass and gathered before the first. With overlap, all but one
    virtual stage's share is under passes of the others."""
    volumes, sizes = communication(config), config.parallelism
    for what, kind, overlaps in (
        ("gradients reduced", "reduce-scatter", sizes.overlap_grad_reduce),
        ("weights gathered", "all-gather", sizes.overlap_param_gather),
    ):
        sent = volumes[kind].sent_bytes if kind in volumes else 0.0
        shown_s = _sent_s(config, sent) / (sizes.vpp if overlaps else 1)
        yield BudgetRow(what, shown_s, "of one virtual stage" if overlaps else "of all virtual stages")


def encoder_row(times: StepTimes) -> BudgetRow:
    """A decoupled encoder runs forward a second time, and sends features; its own FLOPs are the model's."""
    config, what = times.config, "encoder's second forward, exchange"
    if not config.vision_placement.encoder_parts:
        return BudgetRow(what, 0.0, "coupled")
    tokens = VISION_SHARE * config.train.global_batch_size * config.train.seq_len
    patches = tokens * config.model.vision.merge_size**2
    again = times.cost.per_patch * patches + times.cost.per_token * tokens
    seconds = again / config.world_size / flops_per_s(config) + times.gather_s + times.reduce_s
    # Features and their gradients leave all ranks; each first stage receives its replica's.
    seconds += 2 * times.exchange_s(int(tokens / config.dp))
    return BudgetRow(what, seconds, f"{VISION_SHARE:.0%} vision tokens, nothing of it in idle time")


def _sent_s(config: Config, sent_bytes: float) -> float:
    """How long a rank sends its share of what all ranks send."""
    return sent_bytes / config.world_size / network_bytes_per_s(config)
