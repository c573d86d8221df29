"""What one rank of each pipeline stage holds on its device while it trains, and in the host; torch-free.

States are exact but for the padding of buffers. Activations that wait are exact for balanced routing. What a
layer works with is an upper bound. Nothing of this has been measured on a GPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.megatron import TrainedParameter, layer_parameters, vision_parameters
from k25_train.plan.memory.activations import WaitingBytes, peak_held, stage_tensors
from k25_train.plan.memory.kernels import configured_kernels
from k25_train.plan.memory.offload import OffloadBudget, budget_for, offload_need
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.memory.saved_tensors import SavedTensors
from k25_train.plan.optimizer import encoder_parameters, stage_parameters, stage_state
from k25_train.plan.pass_sizes import PassSizes, balanced_sizes
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.units import GB
from parallel.activations.order import offload_order
from parallel.activations.policy import Policy
from parallel.activations.sizes import OUTPUTS_IN_FLIGHT
from parallel.pipeline.schedule import PassKey

OVERHEAD_BYTES = 10 * GB
"""Device memory outside tensors: CUDA's and NCCL's own, and gaps between the allocator's blocks. Source:
Megatron-LM's pull request 6429 reports 9 to 14 GB on H100 between tensors and the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """One rank of a pipeline stage, in bytes. Each is a peak; they may not coincide."""

    stage: int
    """Position in the pipeline, counted from 0."""
    layers: tuple[range, ...]
    """Decoder layers of each of the rank's chunks."""
    num_held: int
    """Passes between forward and backward at the peak."""
    weights: int
    """Weights, a decoupled encoder's among them."""
    gradients: int
    """Gradients of the trained weights."""
    optimizer: int
    """Masters and moments, on the device or in the host."""
    optimizer_on_device: int
    """Masters and moments on the device."""
    saved: int
    """Activations that wait on the device for their backward pass."""
    outputs: int
    """Outputs of chunks until they are sent; if all activations are kept, until their backward pass."""
    buffer: int
    """What the offload engine may keep on its way to the host and back."""
    working: int
    """What one layer, or the head, needs in addition while it is computed."""
    host: int
    """Page-locked host memory for offloaded activations."""
    copied: int
    """Bytes of a micro-batch in all of the rank's chunks that are copied to the host, and back."""

    @property
    def states(self) -> int:
        """What is on the device from step to step."""
        return self.weights + self.gradients + self.optimizer_on_device

    @property
    def activations(self) -> int:
        """What is on the device during a step in addition."""
        return self.saved + self.outputs + self.buffer + self.working

    @property
    def device(self) -> int:
        """All that tensors take on the device."""
        return self.states + self.activations


def stage_memories(pipeline: PipelinePlan) -> list[StageMemory]:
    """The memory of every stage if tokens are spread evenly over experts."""
    return [stage_memory(stage) for stage in pipeline.stages]


def stage_memory(stage: StagePlan) -> StageMemory:
    """The memory of one stage if tokens are spread evenly over experts."""
    config, sizes = stage.config, stage.balanced_sizes
    need = offload_need(stage)
    budget = budget_for(config.activation, need) if config.activation.offloads else OffloadBudget(0, 0)
    weights, gradients = _weights_and_gradients(stage)
    optimizer = round(stage_state(stage).rank_bytes)
    return StageMemory(
        stage=stage.stage,
        layers=tuple(chunk.layers for chunk in stage.chunks),
        num_held=peak_held(stage.sampled_passes, lambda _: 1),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_on_device=0 if config.optim.offload is OptimizerOffload.cpu else optimizer,
        saved=_saved(stage, sizes),
        outputs=_outputs(stage),
        buffer=budget.device_bytes,
        working=_working(stage, sizes),
        host=budget.host_bytes,
        copied=round(need.micro_batch_bytes),
    )


def with_imbalance(stage: StagePlan, memory: StageMemory, imbalance: float) -> StageMemory:
    """The same if the rank's experts get `imbalance` times their even share of tokens in every pass."""
    sizes = balanced_sizes(stage.config, imbalance)
    return replace(memory, saved=_saved(stage, sizes), working=_working(stage, sizes))


def fullest(memories: Iterable[StageMemory]) -> StageMemory:
    """The first stage with the most on its device."""
    return max(memories, key=lambda memory: memory.device)


def room_bytes(config: Config, memory: StageMemory) -> float:
    """Device memory that tensors and `OVERHEAD_BYTES` leave; negative if there is too little."""
    assert config.cluster.gpu_memory_gb is not None, "the CPU has no memory of its own"
    return config.cluster.gpu_memory_gb * GB - OVERHEAD_BYTES - memory.device


def most_imbalance(stage: StagePlan, memory: StageMemory) -> float:
    """How many times their even share of tokens a stage's experts may get in every pass until room ends.

    0 if there is none even now; at most the number of expert-parallel ranks, if all tokens fit.
    """

    def fits(imbalance: float) -> bool:
        return room_bytes(stage.config, with_imbalance(stage, memory, imbalance)) >= 0

    low, high = 0.0, stage.largest_sizes.expert_rows / stage.balanced_sizes.expert_rows
    if fits(high):
        return high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _saved(stage: StagePlan, sizes: PassSizes) -> int:
    """The most bytes of activations that wait on the device."""
    passes = stage.sampled_passes
    stay = offload_order(passes, stage.config.activation.passes_ahead).stay
    leaving = [WaitingBytes.of(each).device for each in stage_tensors(stage, sizes)]
    staying = [WaitingBytes.of(each).device for each in stage_tensors(stage, sizes, offloads=False)]

    def saved(key: PassKey) -> int:
        return staying[key.vp_stage] if key in stay else leaving[key.vp_stage]

    return peak_held(passes, saved)


def _outputs(stage: StagePlan) -> int:
    """The most bytes of chunks' outputs; the last chunk's is the loss, which is nothing."""
    config = stage.config
    output = stage.balanced_sizes.tokens * config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    outputs = peak_held(stage.sampled_passes, lambda key: 0 if stage.chunks[key.vp_stage].is_last else output)
    if config.activation.keeps_all:
        return outputs
    return min(outputs, (OUTPUTS_IN_FLIGHT + 1) * output)


def _working(stage: StagePlan, sizes: PassSizes) -> int:
    """At most: all that a layer saves in its own format, each with its gradient, and the largest gradient of
    a weight before it is accumulated; in addition another layer's forward pass if that is overlapped."""
    config, model = stage.config, stage.config.model
    element_bytes = WEIGHT_BYTES[config.train.dtype]
    kept = dict.fromkeys(config.activation.policies(), Policy.keep)
    lists = SavedTensors(model, config.train.dtype, configured_kernels(config), kept, sizes)
    num_passes = 2 if config.parallelism.overlap_expert_comm else 1
    found = []
    for chunk in stage.chunks:
        for layer in chunk.layers:
            tensors = lists.layer(is_moe=model.is_moe(layer))
            made = sum(tensor.memory_bytes for tensor in tensors)
            gradients = sum(tensor.num_bytes for tensor in tensors if tensor.may_be_rounded)
            of_weight = max(_rank_size(config, each) for each in layer_parameters(model, layer))
            found.append(num_passes * made + gradients + of_weight * element_bytes)
        if chunk.is_last:
            # Logits and their gradient, in the model's format and in float32.
            found.append(sizes.tokens * model.vocab_size * (element_bytes + FLOAT_BYTES))
    return max(found, default=0)


def _weights_and_gradients(stage: StagePlan) -> tuple[int, int]:
    """Bytes of a rank's weights, a decoupled encoder's among them, and of the gradients of those trained."""
    config = stage.config
    held = [each for each in vision_parameters(config.model) if _holds_vision(stage, each)]
    held += stage.text_parameters()
    trained = [*encoder_parameters(config), *stage_parameters(stage)]
    weights = sum(_rank_size(config, parameter) for parameter in held)
    gradients = sum(_rank_size(config, parameter) for parameter in trained)
    return weights * WEIGHT_BYTES[config.train.dtype], gradients * GRADIENT_BYTES


def _holds_vision(stage: StagePlan, parameter: TrainedParameter) -> bool:
    return stage.stage == 0 or VisionPart.of(parameter.name) in stage.config.vision_placement.encoder_parts


def _rank_size(config: Config, parameter: TrainedParameter) -> int:
    return parameter.size // (config.parallelism.ep if parameter.is_expert else 1)
