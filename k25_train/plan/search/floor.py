"""The least time that a step of a layout can take: what the simulation of it can only add to; torch-free.

A stage starts when the first micro-batch has passed all chunks before its first one, then computes its share
of all micro-batches, and the last one still has to go back through the chunks before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.plan.assumptions import Compute
from k25_train.plan.flops import head_forward_flops, layer_forward_flops
from k25_train.plan.kernels.kernel import Precision
from k25_train.plan.kernels.seconds import flops_per_s
from k25_train.plan.pipeline import PipelinePlan
from parallel.pipeline.balance import chunk_loads
from parallel.pipeline.schedule import BACKWARD_COST


@dataclass(frozen=True, slots=True)
class ChunkFloor:
    """The least that a micro-batch takes in a chunk, in seconds."""

    forward_s: float
    """Forward pass."""
    backward_s: float
    """Backward pass."""
    back_s: float
    """From the gradient of its output to that of its input: less than the backward pass if weight gradients
    can be computed later."""


def step_floor_s(chunks: Sequence[ChunkFloor], pp: int, num_micro_batches: int) -> float:
    """The least seconds of a step.

    Args:
        chunks: in pipeline order.
        pp: pipeline ranks.
        num_micro_batches: of a step on a replica.
    """
    least_s = before_s = 0.0
    for stage in range(pp):
        own_s = sum(chunk.forward_s + chunk.backward_s for chunk in chunks[stage::pp])
        least_s = max(least_s, before_s + num_micro_batches * own_s)
        before_s += chunks[stage].forward_s + chunks[stage].back_s
    return least_s


def flops_floor_s(pipeline: PipelinePlan) -> float:
    """The floor if all that takes time were the model's FLOPs, at the rates of large products.

    Weight gradients may come later than the gradient for the stage before, if they are delayed.
    """
    config, documents = pipeline.config, pipeline.stages[0].balanced_sizes.documents
    layers = range(config.model.num_layers)
    flops = chunk_loads(
        tuple(layer_forward_flops(config.model, layer, documents) for layer in layers),
        pipeline.layout.layers_per_chunk,
        0,
        head_forward_flops(config.model, sum(documents)),
    )
    each_s = [load / _fastest(pipeline) for load in flops]
    back = 1 if config.parallelism.delay_wgrad else BACKWARD_COST
    chunks = [ChunkFloor(each, BACKWARD_COST * each, back * each) for each in each_s]
    return step_floor_s(chunks, config.parallelism.pp, pipeline.num_micro_batches)


def _fastest(pipeline: PipelinePlan) -> float:
    """Operations a second of the fastest kernels that there are."""
    rates = pipeline.config.cluster.rates
    precision = Precision.of(pipeline.config.train.dtype)
    if pipeline.assumptions.code.compute is Compute.fp8:
        precision = Precision.fp8
    fastest = flops_per_s(rates, precision)
    peak = rates.float32_tflops if precision is Precision.float32 else rates.bf16_tflops
    attention = 1e12 * peak * max(rates.attention_efficiency, rates.attention_backward_efficiency)
    return max(fastest, attention) / rates.calibration.kernels
