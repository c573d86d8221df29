"""How long the optimizer's part of a step takes on a rank, as far as it can be computed; torch-free.

Three things run concurrently, in the rounds of the exchange (`parallel/muon`): Newton-Schulz, the exchange of
matrices, and state that streams through the device (`optim.offload=cpu`). The longest of them counts, and
what comes before the first round and after the last; elementwise arithmetic is added. Nothing of this has
been measured on a GPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from k25_train.config.optimizer import OptimizerOffload, OptimName
from k25_train.config.schema import Config
from k25_train.parameters.megatron import TrainedParameter
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.kernel import Precision, Product
from k25_train.plan.kernels.seconds import kernels_s, moved_s
from k25_train.plan.memory.pipeline_peak import rank_size
from k25_train.plan.optimizer import (
    encoder_parameters,
    stage_parameters,
    stage_state,
    weights_by_update,
)
from k25_train.plan.pipeline import PipelinePlan, StagePlan, distinct_stages
from k25_train.plan.time.expert_exchange import NETWORK_SHARE, message_factor
from k25_train.plan.time.step import network_bytes_per_s
from k25_train.plan.time.step_plan import Part
from k25_train.plan.weight_bytes import WEIGHT_BYTES, host_state_bytes
from k25_train.units import GB, MIB
from parallel.muon.plan import newton_schulz_flops

UPDATE_BYTES = 32
"""Bytes that are read and written for a weight that is updated: gradient for the norm and for momentum,
momentum, direction, update, master, and the weight in the model's type."""


@dataclass(frozen=True, slots=True)
class MuonMatrix:
    """Equal matrices that Muon orthogonalises."""

    rows: int
    cols: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerTimes:
    """The optimizer on one rank of a stage, in seconds per step."""

    stage: int
    """Position in the pipeline, counted from 0."""
    newton_schulz_flops: float
    """What a rank computes if matrices are spread evenly over owners, and at least one of the largest."""
    newton_schulz_s: float
    """How long that takes in `optim.muon.newton_schulz_dtype`."""
    largest_matrix_s: float
    """How long the largest matrix takes, which no number of ranks makes shorter."""
    exchange_s: float
    """How long a rank sends pieces to owners and updates back, at most: what an owner holds stays."""
    stream_bytes: float
    """Bytes of state that cross the bus in each direction; 0 if state is on the device."""
    stream_s: float
    """How long they take; both directions run concurrently."""
    edges_s: float
    """First load and last write-back, when nothing else runs."""

    @property
    def total_s(self) -> float:
        """How long the step's other work waits for the optimizer."""
        return max(self.newton_schulz_s, self.exchange_s, self.stream_s) + self.edges_s


def slowest_optimizer(pipeline: PipelinePlan) -> OptimizerTimes:
    """The stage whose optimizer takes longest; the first of several."""
    return max(map(optimizer_times, distinct_stages(pipeline)), key=lambda times: times.total_s)


def optimizer_times(stage: StagePlan) -> OptimizerTimes:
    """The optimizer on one rank of a stage, a decoupled encoder's share included."""
    config, muon = stage.config, stage.config.optim.muon
    # 1. Newton-Schulz: owners are among the stage's replicas, of an encoder's matrices among all ranks.
    own, encoder = list(stage_parameters(stage)), encoder_parameters(config)
    work, work_s, largest, largest_s = 0.0, 0.0, 0, 0.0
    for parameters, num_ranks in ((own, config.dp_cp), (encoder, config.world_size)):
        for matrix in muon_matrices(config, parameters):
            flops = newton_schulz_flops(matrix.rows, matrix.cols, muon.newton_schulz_steps)
            seconds = newton_schulz_s(config, matrix)
            work, work_s = (
                total + matrix.number * each / num_ranks for total, each in ((work, flops), (work_s, seconds))
            )
            largest, largest_s = max(largest, flops), max(largest_s, seconds)
    # 2. The exchange.
    held = {
        update: number / config.dp_cp + weights_by_update(config, encoder)[update] / config.world_size
        for update, number in stage_state(stage).num_weights.items()
    }
    sent = 2 * held[OptimName.muonclip] * WEIGHT_BYTES[muon.exchange_dtype] if config.world_size > 1 else 0.0
    # 3. Streaming.
    is_streamed = config.optim.offload is OptimizerOffload.cpu
    bus = GB * config.cluster.host_copy_gb_per_s
    stream_bytes = sum(number * host_state_bytes(update) for update, number in held.items()) * is_streamed
    edge_bytes = 2 * min(4 * held[OptimName.muonclip], muon.exchange_mib * MIB) * is_streamed
    return OptimizerTimes(
        stage=stage.stage,
        newton_schulz_flops=max(work, largest),
        newton_schulz_s=max(work_s, largest_s),
        largest_matrix_s=largest_s,
        exchange_s=message_factor(config) * sent / (NETWORK_SHARE * network_bytes_per_s(config)),
        stream_bytes=stream_bytes,
        stream_s=stream_bytes / bus,
        edges_s=edge_bytes / bus,
    )


def newton_schulz_s(config: Config, matrix: MuonMatrix) -> float:
    """How long one such matrix takes: three products for each step (`parallel.muon.plan`)."""
    m, n = sorted((matrix.rows, matrix.cols))
    muon = config.optim.muon
    products = (
        Product("X X^T", m, m, n),
        Product("A A", m, m, m),
        Product("A X", m, n, m),
    )
    precision = Precision.of(muon.newton_schulz_dtype)
    return muon.newton_schulz_steps * kernels_s(products, config.cluster.rates, precision)


def muon_matrices(config: Config, parameters: Iterable[TrainedParameter]) -> Iterator[MuonMatrix]:
    """The matrices of these parameters, equal ones of a parameter together."""
    for parameter in parameters:
        rule = rule_of(*parameter, config.optim, config.model)
        if rule.update is OptimName.muonclip:
            columns = parameter.shape[-1]
            rows = parameter.size // columns
            yield MuonMatrix(rows // rule.num_matrices, columns, rule.num_matrices)


def optimizer_part(pipeline: PipelinePlan) -> Part:
    """The optimizer of the stage where it takes longest, and what it does to every weight."""
    config, times = pipeline.config, slowest_optimizer(pipeline)
    # Gradients are cleared whole on each rank; norm and update go over the rank's share.
    stages = distinct_stages(pipeline)
    held = max(sum(rank_size(config, each) for each in stage_parameters(stage)) for stage in stages)
    updated = max(sum(stage_state(stage).num_weights.values()) for stage in stages) / config.dp_cp
    gradient_bytes = pipeline.assumptions.code.gradient_bytes
    elementwise_s = moved_s(gradient_bytes * held + UPDATE_BYTES * updated, config.cluster.rates)
    slow = pipeline.assumptions.slow_node
    parts = {
        "state streamed": times.stream_s,
        "Newton-Schulz": slow * times.newton_schulz_s,
        "matrices sent": times.exchange_s,
    }
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    how = f"the longest of: {told}; {times.edges_s:.2f} before, after; elementwise {elementwise_s:.2f}"
    return Part(Cause.optimizer, max(parts.values()) + times.edges_s + slow * elementwise_s, how)
