"""Floating-point operations that the model needs, counted from the configuration; torch-free.

Counted are the matrix products, two operations per multiply-add; norms, softmax, activations and rotations
are not. Attention is counted over what the masks leave: half the square of each document, the square of
each image. A backward pass costs twice the forward, without gradients of weights once; what is computed
again to save memory is not counted, so these are the FLOPs of "model FLOPs utilisation" (MFU, arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from k25_train.config.model import ModelConfig
from k25_train.config.parts import ModelPart
from k25_train.config.vision import VisionConfig
from k25_train.plan.batch_sizes import BatchSizes, causal_pairs
from k25_train.plan.projections import attention_projections, feed_forward_projections, head_projection
from parallel.dep.cost import EncoderCost
from parallel.pipeline.schedule import BACKWARD_COST


def training_flops(
    model: ModelConfig, sizes: BatchSizes, trained: frozenset[ModelPart], *, mtp_layers: int = 0
) -> int:
    """Forward and backward of the language model, tower and projector over a batch.

    The sums of the batch are enough, however many documents and items it has: a product costs what is
    proportional to tokens or patches, and attention what is proportional to their pairs.

    Args:
        model: dimensions.
        sizes: of the batch; attention does not cross documents or items.
        trained: parts; what is frozen costs its forward pass alone, but the language model, through which
            gradients go to vision.
        mtp_layers: layers of multi-token prediction, which others train.
    """
    layers = range(model.num_layers)
    text = sum(_layer_flops(model, layer, sizes.num_tokens, sizes.num_token_pairs) for layer in layers)
    text += head_forward_flops(model, sizes.num_tokens)
    text += mtp_layers * mtp_forward_flops(model, sizes.num_tokens, sizes.num_token_pairs)
    # A frozen language model hands gradients on to vision: weights have none, queries, keys and values do.
    if ModelPart.language_model in trained:
        text_backward = BACKWARD_COST * text
    else:
        pairs = (model.num_layers + mtp_layers) * _pair_flops(model, sizes.num_token_pairs)
        text_backward = text + (BACKWARD_COST - 1) * pairs
    tower = _of_sums(tower_cost(model.vision), sizes)
    projector = _of_sums(encoder_cost(model.vision, model.hidden_size), sizes) - tower
    # The projector's norm comes first and is trained, so a backward pass goes through all of it.
    vision = {ModelPart.vision_tower: tower, ModelPart.mm_projector: projector}
    vision_backward = BACKWARD_COST * sum(flops for part, flops in vision.items() if part in trained)
    return text + tower + projector + text_backward + vision_backward


def _of_sums(cost: EncoderCost, sizes: BatchSizes) -> int:
    """What `EncoderCost.of_item` sums up to over all items of a batch."""
    of_patches = cost.per_patch * sizes.num_patches + cost.per_pair * sizes.num_patch_pairs
    return of_patches + cost.per_token * sizes.num_vision_tokens


def layer_forward_flops(model: ModelConfig, layer: int, document_lengths: Sequence[int]) -> int:
    """One forward pass of a decoder layer, counted from 0, over packed documents."""
    return _layer_flops(model, layer, sum(document_lengths), causal_pairs(document_lengths))


def _layer_flops(model: ModelConfig, layer: int, num_tokens: int, num_pairs: int) -> int:
    return 2 * num_tokens * layer_multiply_adds(model, layer) + _pair_flops(model, num_pairs)


def _pair_flops(model: ModelConfig, num_pairs: int) -> int:
    """One forward pass of a layer's attention between queries and keys."""
    return 2 * num_pairs * model.num_attention_heads * (model.q_head_dim + model.v_head_dim)


def head_forward_flops(model: ModelConfig, num_tokens: int) -> int:
    """One forward pass of the output head."""
    return 2 * num_tokens * head_projection(model).multiply_adds


def layer_multiply_adds(model: ModelConfig, layer: int) -> int:
    """Multiply-adds that each token costs in a decoder layer, but for attention's over the context."""
    others = sum(each.multiply_adds for each in feed_forward_projections(model, layer))
    return attention_multiply_adds(model) + others


def attention_multiply_adds(model: ModelConfig) -> int:
    """Multiply-adds per token of the projections around one layer's attention."""
    return sum(each.multiply_adds for each in attention_projections(model))


def mtp_forward_flops(model: ModelConfig, num_tokens: int, num_pairs: int) -> int:
    """One forward pass of a layer of multi-token prediction: what joins a token's features and the next one's
    embedding, a decoder layer like the last, and the output head (DeepSeek-V3 report, section 2.2)."""
    joined = 2 * num_tokens * 2 * model.hidden_size**2
    layer = _layer_flops(model, model.num_layers - 1, num_tokens, num_pairs)
    return joined + layer + head_forward_flops(model, num_tokens)


def encoder_cost(vision: VisionConfig, text_hidden_size: int) -> EncoderCost:
    """FLOPs of one forward pass of tower and projector by what they are proportional to."""
    merged = vision.merged_size
    return replace(tower_cost(vision), per_token=2 * (merged**2 + merged * text_hidden_size))


def tower_cost(vision: VisionConfig) -> EncoderCost:
    """The same of the tower alone."""
    width = vision.hidden_size
    block = 4 * width**2 + 2 * width * vision.ffn_hidden_size
    return EncoderCost(
        per_patch=2 * (3 * vision.patch_size**2 * width + vision.num_layers * block),
        per_pair=2 * vision.num_layers * 2 * width,
    )
