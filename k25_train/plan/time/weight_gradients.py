"""What the weight gradients of a layer's experts move through memory per micro-batch; torch-free.

A product that adds to `main_grad` reads and writes it while it multiplies. Otherwise it writes a tensor in
the weights' type, and a second kernel reads that and adds it, which nothing hides.
"""

from dataclasses import dataclass

from k25_train.config.basics import DType
from k25_train.config.model import ModelConfig
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGradientBytes:
    """Bytes per MoE layer and micro-batch on one rank, operands not counted."""

    accumulating: int
    """Read and written by products that add to `main_grad`, while they multiply."""
    written: int
    """Written by products that do not."""
    added: int
    """Read and written by the kernels that then add it to `main_grad`; saved where products add."""
    temporary: int
    """The larger of a layer's two tensors of gradients; not made where products add."""


def expert_weight_gradient_bytes(
    model: ModelConfig, dtype: DType, num_local_experts: int
) -> WeightGradientBytes:
    """Of a layer of which a rank has so many experts: gate and up are one tensor, down is half as large."""
    down = num_local_experts * model.expert_ffn_hidden_size * model.hidden_size
    num_weights, weight_bytes = 3 * down, WEIGHT_BYTES[dtype]
    return WeightGradientBytes(
        accumulating=2 * GRADIENT_BYTES * num_weights,
        written=weight_bytes * num_weights,
        added=(weight_bytes + 2 * GRADIENT_BYTES) * num_weights,
        temporary=weight_bytes * 2 * down,
    )
