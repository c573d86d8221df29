"""Every parameter as training holds it, from the configuration alone; torch-free.

These are the checkpoint's tensors (`parameters.py`) under megatron-core's names and with three layouts of
their own: gate and up projection stand in one matrix, the experts of a layer are stacked, and the patch
embedding is a matrix.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from k25_train.config.model import ModelConfig
from k25_train.parameters.released import attention_tensors, projector_tensors, vision_tensors

ATTENTION = {
    ".q_a_proj.weight": "linear_q_down_proj",
    ".q_a_layernorm.weight": "q_layernorm",
    ".q_b_proj.weight": "linear_q_up_proj",
    ".kv_a_proj_with_mqa.weight": "linear_kv_down_proj",
    ".kv_a_layernorm.weight": "kv_layernorm",
    ".kv_b_proj.weight": "linear_kv_up_proj",
    ".o_proj.weight": "linear_proj",
}
"""The checkpoint's names -> megatron-core's."""


class TrainedParameter(NamedTuple):
    """One parameter, whole: as a rank has it that holds all experts of the layer."""

    name: str
    """Global name, as `k25_train/model/weights.py` has it but for the experts, which are stacked here."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it is stacked routed experts, cut over expert-parallel ranks along the first axis."""
        return ".mlp.experts." in self.name


def iterate_parameters(model: ModelConfig) -> Iterator[TrainedParameter]:
    """Every parameter of the model, in the order of the forward pass."""
    yield from vision_parameters(model)
    yield embedding_parameter(model)
    for layer in range(model.num_layers):
        yield from layer_parameters(model, layer)
    yield from head_parameters(model)


def embedding_parameter(model: ModelConfig) -> TrainedParameter:
    """The word embedding."""
    table = (model.vocab_size, model.hidden_size)
    return TrainedParameter("language_model.embedding.word_embeddings.weight", table)


def head_parameters(model: ModelConfig) -> Iterator[TrainedParameter]:
    """What stands behind the last layer."""
    yield TrainedParameter("language_model.decoder.final_layernorm.weight", (model.hidden_size,))
    yield TrainedParameter("language_model.output_layer.weight", (model.vocab_size, model.hidden_size))


def layer_parameters(model: ModelConfig, layer: int) -> Iterator[TrainedParameter]:
    """One decoder layer, counted from 0."""
    hidden, prefix = model.hidden_size, f"language_model.decoder.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
    }
    for tensor in attention_tensors(model, ""):
        shapes[f"self_attention.{ATTENTION[tensor.name]}.weight"] = tensor.shape
    if not model.is_moe(layer):
        shapes |= swiglu("mlp", model.dense_ffn_hidden_size, hidden)
    else:
        num_experts, width = model.num_experts, model.expert_ffn_hidden_size
        shapes["mlp.router.weight"] = (num_experts, hidden)
        shapes["mlp.experts.gate_up_proj"] = (num_experts, 2 * width, hidden)
        shapes["mlp.experts.down_proj"] = (num_experts, hidden, width)
        shapes |= swiglu("mlp.shared_experts", model.num_shared_experts * width, hidden)
    for name, shape in shapes.items():
        yield TrainedParameter(f"{prefix}.{name}", shape)


def swiglu(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one SwiGLU's two matrices."""
    return {
        f"{prefix}.linear_fc1.weight": (2 * width, hidden),
        f"{prefix}.linear_fc2.weight": (hidden, width),
    }


def vision_parameters(model: ModelConfig) -> Iterator[TrainedParameter]:
    """Vision tower and projector, which keep the checkpoint's names."""
    tensors = (*vision_tensors(model.vision), *projector_tensors(model.vision, model.hidden_size))
    for tensor in tensors:
        is_convolution = len(tensor.shape) == 4
        shape = (tensor.shape[0], prod(tensor.shape[1:])) if is_convolution else tensor.shape
        yield TrainedParameter(tensor.name, shape)
