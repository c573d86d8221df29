"""What the passes of a pipeline rank take on the device at their peak; torch-free.

Activations that wait are exact for balanced routing. What a layer works with is an upper bound.
"""

from collections.abc import Iterator

from k25_train.config.model import LOSS_PIECE_BYTES
from k25_train.config.schema import Config
from k25_train.parameters.megatron import TrainedParameter
from k25_train.plan.assumptions import Sharding
from k25_train.plan.head_pieces import rows_of_head
from k25_train.plan.memory.activations import peak_of_turns, stage_waiting
from k25_train.plan.memory.kernels import configured_kernels
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.memory.saved_tensors import SavedTensors
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.pipeline import ChunkPlan, StagePlan
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.activations.policy import Policy
from parallel.activations.sizes import OUTPUTS_IN_FLIGHT

PIECES_AT_WORK = 4
"""Float32 pieces of logits in the loss's backward pass: the logits, normalised, and the gradients of both."""


def saved_bytes(stage: StagePlan, sizes: PassSizes) -> int:
    """The most bytes of activations that wait on the device."""
    leaving = [each.device for each in stage_waiting(stage, sizes)]
    staying = [each.device for each in stage_waiting(stage, sizes, offloads=False)]
    return peak_of_turns(stage, leaving, staying, frees_by_layer=True)


def output_bytes(stage: StagePlan) -> int:
    """The most bytes of chunks' outputs; the last chunk's is the loss, which is nothing."""
    config = stage.config
    output = stage.balanced_sizes.tokens * config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    of_chunks = [0 if chunk.is_last else output for chunk in stage.chunks]
    outputs = peak_of_turns(stage, of_chunks, of_chunks)
    if config.activation.keeps_all:
        return outputs
    return min(outputs, (OUTPUTS_IN_FLIGHT + 1) * output)


def working_bytes(stage: StagePlan, sizes: PassSizes) -> int:
    """At most: all that a layer saves in its own format, and gradients; in addition another layer's forward
    pass if that is overlapped. Tokens on their way to experts are counted elsewhere (`exchange_bytes`)."""
    passes = max((each for chunk in stage.chunks for each in _in_chunk(stage, chunk, sizes)), default=0)
    return passes + _gathered_bytes(stage)


def _gathered_bytes(stage: StagePlan) -> int:
    """Where ranks share weights (FSDP2): those of a layer and of the next one, whole, and its gradients."""
    code, config = stage.assumptions.code, stage.config
    if code.sharding is not Sharding.weights:
        return 0
    largest = max(
        (
            sum(each.size // (config.parallelism.ep if each.is_expert else 1) for each in parameters)
            for parameters in map(stage.parameters.layer, (0, config.model.num_layers - 1))
        ),
    )
    return largest * (2 * WEIGHT_BYTES[config.train.dtype] + code.gradient_bytes)


def _in_chunk(stage: StagePlan, chunk: ChunkPlan, sizes: PassSizes) -> Iterator[int]:
    config, model = stage.config, stage.config.model
    element_bytes = WEIGHT_BYTES[config.train.dtype]
    kept = dict.fromkeys(config.activation.policies(), Policy.keep)
    kernels = configured_kernels(config, stage.assumptions.code)
    lists = SavedTensors(model, config.train.dtype, kernels, kept, sizes)
    num_passes = 2 if config.parallelism.overlap_expert_comm else 1
    # 1. Layers: the gradient of a layer's output is there from the start.
    made, output = 0, sizes.tokens * model.hidden_size * element_bytes
    for layer in chunk.layers:
        tensors = lists.layer(is_moe=model.is_moe(layer))
        made = num_passes * sum(tensor.memory_bytes for tensor in tensors) + output
        # The gradients of its weights go to where they are added up. A dense layer takes most when its SwiGLU
        # goes backward.
        hidden = 0 if model.is_moe(layer) else 2 * sizes.tokens * model.dense_ffn_hidden_size
        yield made + hidden * element_bytes
    # 2. The rows that the embedding's gradient adds, in float32, while another layer runs.
    if chunk.is_first:
        yield made // 2 + sizes.tokens * model.hidden_size * FLOAT_BYTES
    if chunk.is_last:
        yield _of_head(stage, sizes)


def _of_head(stage: StagePlan, sizes: PassSizes) -> int:
    """Logits and their gradient, or a piece of the logits, which its gradient replaces, and the gradient of
    the head's input; and smaller pieces in float32."""
    config, model = stage.config, stage.config.model
    element_bytes = WEIGHT_BYTES[config.train.dtype]
    rows, at_once = sizes.tokens, 2 * sizes.tokens * model.vocab_size * element_bytes
    if config.activation.head.logits is Policy.recompute:
        rows = rows_of_head(sizes.tokens, model.vocab_size, element_bytes)
        at_once = (rows * model.vocab_size + sizes.tokens * model.hidden_size) * element_bytes
    return at_once + PIECES_AT_WORK * min(LOSS_PIECE_BYTES, rows * model.vocab_size * FLOAT_BYTES)


def rank_size(config: Config, parameter: TrainedParameter) -> int:
    """Elements of a parameter on one rank."""
    return parameter.size // (config.parallelism.ep if parameter.is_expert else 1)
