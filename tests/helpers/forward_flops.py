"""FLOPs of single forward passes, document by document and item by item: what sums of a batch must give."""

from collections.abc import Sequence

from k25_train.config.model import ModelConfig
from k25_train.config.vision import VisionConfig
from k25_train.plan.flops import (
    encoder_cost,
    head_forward_flops,
    layer_forward_flops,
    layer_multiply_adds,
)
from parallel.dep.grid import Grid


def text_forward_flops(model: ModelConfig, document_lengths: Sequence[int]) -> int:
    """One forward pass of the language model, output head included, over packed documents."""
    layers = sum(layer_forward_flops(model, layer, document_lengths) for layer in range(model.num_layers))
    return layers + head_forward_flops(model, sum(document_lengths))


def token_multiply_adds(model: ModelConfig) -> int:
    """Multiply-adds that each token costs whatever its context: all matrices that it passes."""
    layers = sum(layer_multiply_adds(model, layer) for layer in range(model.num_layers))
    return layers + model.hidden_size * model.vocab_size


def vision_forward_flops(vision: VisionConfig, text_hidden_size: int, grid_thw: Sequence[Grid]) -> int:
    """One forward pass of tower and projector; all frames of an item attend jointly."""
    cost = encoder_cost(vision, text_hidden_size)
    return sum(cost.of_item(grid) for grid in grid_thw)
