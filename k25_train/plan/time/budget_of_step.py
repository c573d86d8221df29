"""Rows of a step's budget that occur once in it; torch-free."""

import math
from collections.abc import Iterator

from k25_train.config.basics import DType
from k25_train.config.optimizer import OptimizerOffload, OptimName
from k25_train.config.schema import Config
from k25_train.plan.optimizer import ParameterKind, parameter_kinds, stage_states
from k25_train.plan.pass_sizes import VISION_SHARE
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.budget_row import FLOAT32_TFLOPS, BudgetRow
from k25_train.plan.time.communication import communication
from k25_train.plan.time.step import StepTimes, flops_per_s, network_bytes_per_s
from k25_train.units import GB
from parallel.muon.plan import newton_schulz_flops

HOST_WORK_S = 0.05
"""Work of the host between two steps, while the device waits: what `tests.bench.host_work` allows."""


def optimizer_row(pipeline: PipelinePlan) -> BudgetRow:
    """State that streams through the device, Newton-Schulz and the exchange of matrices run concurrently, in
    rounds: the longest of them shows. The largest matrix is computed by one rank."""
    config = pipeline.config
    state_bytes = max(state.rank_bytes for state in stage_states(pipeline))
    is_streamed = config.optim.offload is not OptimizerOffload.none
    matrices = communication(config).get("matrices")
    parts = {
        "state streamed": state_bytes / (GB * config.cluster.host_copy_gb_per_s) if is_streamed else 0.0,
        "Newton-Schulz": newton_schulz_s(config),
        "matrices sent": _sent_s(config, matrices.sent_bytes) if matrices is not None else 0.0,
    }
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    return BudgetRow("optimizer", max(parts.values()), f"the longest of: {told}")


def newton_schulz_s(config: Config) -> float:
    """How long the busiest rank orthogonalises: an equal share of all matrices, or the costliest one."""
    muon = config.optim.muon
    in_bfloat16 = muon.newton_schulz_dtype is DType.bfloat16
    rate = flops_per_s(config) if in_bfloat16 else 1e12 * FLOAT32_TFLOPS
    costs = []
    for kind in parameter_kinds(config):
        if kind.rule.update is OptimName.muonclip and kind.matrix is not None:
            flops = newton_schulz_flops(*kind.matrix, muon.newton_schulz_steps)
            costs.append((num_matrices(kind), flops))
    if not costs:
        return 0.0
    equal_share = sum(number * flops for number, flops in costs) / config.world_size
    return max(equal_share, *(flops for _, flops in costs)) / rate


def num_matrices(kind: ParameterKind) -> int:
    """Matrices that the parameters of a kind are orthogonalised as."""
    rows, columns = kind.matrix or kind.shape
    return kind.num_parameters * math.prod(kind.shape) // (rows * columns)


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
