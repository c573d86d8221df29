"""What one rank of each pipeline stage holds on its device while it trains, and in the host; torch-free.

States are exact but for the padding of buffers. Activations that wait are exact for balanced routing. What a
layer works with is an upper bound. Nothing of this has been measured on a GPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    layer_parameters,
    vision_parameters,
)
from k25_train.plan.layer_costs import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.plan.layout import layout_of
from k25_train.plan.memory.activations import (
    OffloadBudget,
    WaitingBytes,
    balanced_sizes,
    budget_for,
    largest_sizes,
    offload_need,
    peak_held,
    stage_tensors,
)
from k25_train.plan.memory.saved_tensors import FLOAT_BYTES, KERNELS, PassSizes, SavedTensors
from k25_train.plan.optimizer import StageState, encoder_parameters, stage_parameters, stage_states
from k25_train.plan.passes import sample_of_passes
from parallel.activations.order import offload_order
from parallel.activations.policy import Policy
from parallel.activations.sizes import OUTPUTS_IN_FLIGHT
from parallel.pipeline.schedule import PassKey

OVERHEAD_BYTES = 10 * 10**9
"""What a device gives to others than tensors: CUDA's and NCCL's own memory and gaps between the allocator's
blocks. Source: Megatron-LM's pull request 6429 reports 9 to 14 GB on H100 between tensors and the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """One rank of a pipeline stage, in bytes. Each is a peak; they may not fall together."""

    stage: int
    layers: tuple[range, ...]
    """Of each of its chunks."""
    num_held: int
    """Passes between forward and backward at the peak."""
    weights: int
    gradients: int
    optimizer: int
    """Masters and moments, wherever they are."""
    optimizer_on_device: int
    saved: int
    """Activations that wait on the device."""
    outputs: int
    """Of chunks: until they are sent; if all activations are kept, the schedule holds them until their
    backward."""
    buffer: int
    """What the offload engine may keep on its way to the host and back."""
    working: int
    """What one layer, or the head, has around it while it is computed."""
    host: int
    """Page-locked for offloaded activations."""
    copied: int
    """To the host of a micro-batch in all of the rank's chunks, and back."""

    @property
    def states(self) -> int:
        """On the device from step to step."""
        return self.weights + self.gradients + self.optimizer_on_device

    @property
    def activations(self) -> int:
        """On the device beside them."""
        return self.saved + self.outputs + self.buffer + self.working

    @property
    def device(self) -> int:
        """All that tensors take on the device."""
        return self.states + self.activations


def stage_memories(config: Config, imbalance: float = 1.0) -> list[StageMemory]:
    """Every stage's; `imbalance` is how many times their share of the tokens the rank's experts get."""
    states = stage_states(config)
    return [stage_memory(config, state, imbalance) for state in states]


def stage_memory(config: Config, state: StageState, imbalance: float = 1.0) -> StageMemory:
    """One stage's; see `stage_memories`."""
    stage, layout = state.stage, layout_of(config)
    sizes = balanced_sizes(config, imbalance)
    saved, num_held, outputs = _waiting(config, stage, sizes)
    need = offload_need(config, stage)
    budget = budget_for(config, need) if config.activation.offloads else OffloadBudget(0, 0)
    weights, gradients = _weights_and_gradients(config, stage)
    optimizer = round(state.rank_bytes)
    return StageMemory(
        stage=stage,
        layers=tuple(layout.layer_ids(stage, vp_stage) for vp_stage in range(layout.vpp)),
        num_held=num_held,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_on_device=0 if config.optim.offload is OptimizerOffload.cpu else optimizer,
        saved=saved,
        outputs=outputs,
        buffer=budget.device_bytes,
        working=_working(config, stage, sizes),
        host=budget.host_bytes,
        copied=round(need.micro_batch_bytes),
    )


def fullest(memories: Iterable[StageMemory]) -> StageMemory:
    """The first stage with the most on its device."""
    return max(memories, key=lambda memory: memory.device)


def room_bytes(config: Config, memory: StageMemory) -> float:
    """What is left of the device beside all tensors and `OVERHEAD_BYTES`; negative if too little is there."""
    assert config.cluster.gpu_memory_gb is not None, "the CPU has no memory of its own"
    return config.cluster.gpu_memory_gb * 1e9 - OVERHEAD_BYTES - memory.device


def most_imbalance(config: Config, memory: StageMemory) -> float:
    """How many times their share of the tokens a stage's experts may get, in every pass, until room ends.

    0 if there is none even now; the number of expert-parallel ranks or less if all tokens fit.
    """
    state = stage_states(config)[memory.stage]
    low, high = 0.0, largest_sizes(config).expert_rows / balanced_sizes(config).expert_rows
    if room_bytes(config, stage_memory(config, state, high)) >= 0:
        return high
    for _ in range(12):
        middle = (low + high) / 2
        if room_bytes(config, stage_memory(config, state, middle)) >= 0:
            low = middle
        else:
            high = middle
    return low


def _waiting(config: Config, stage: int, sizes: PassSizes) -> tuple[int, int, int]:
    """Peaks: bytes that wait on the device, passes between forward and backward, bytes of their outputs."""
    passes, layout = sample_of_passes(config, stage), layout_of(config)
    stay = offload_order(passes, config.activation.passes_ahead).stay
    leaving = [WaitingBytes.of(each).device for each in stage_tensors(config, stage, sizes)]
    staying = [WaitingBytes.of(each).device for each in stage_tensors(config, stage, sizes, offloads=False)]
    output = sizes.tokens * config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]

    def saved(key: PassKey) -> int:
        return staying[key.vp_stage] if key in stay else leaving[key.vp_stage]

    def sent(key: PassKey) -> int:
        return 0 if layout.is_last(stage, key.vp_stage) else output

    outputs = peak_held(passes, sent)
    if not config.activation.keeps_all:
        outputs = min(outputs, (OUTPUTS_IN_FLIGHT + 1) * output)
    return peak_held(passes, saved), peak_held(passes, lambda _: 1), outputs


def _working(config: Config, stage: int, sizes: PassSizes) -> int:
    """At most: all that a layer saves as it was made, each with its gradient, and the largest gradient of a
    weight before it is added up; beside it another layer's forward pass if that is overlapped."""
    layout, model = layout_of(config), config.model
    element_bytes = WEIGHT_BYTES[config.train.dtype]
    kept = dict.fromkeys(config.activation.policies(), Policy.keep)
    lists = SavedTensors(model, config.train.dtype, KERNELS[config.cluster.device], kept, sizes)
    found = []
    for vp_stage in range(layout.vpp):
        for layer in layout.layer_ids(stage, vp_stage):
            tensors = lists.layer(is_moe=model.is_moe(layer))
            made = sum(tensor.memory_bytes for tensor in tensors)
            gradients = sum(tensor.num_bytes for tensor in tensors if tensor.may_be_rounded)
            of_weight = max(_rank_size(config, each) for each in layer_parameters(model, layer))
            passes = 2 if config.parallelism.overlap_expert_comm else 1
            found.append(passes * made + gradients + of_weight * element_bytes)
        if layout.is_last(stage, vp_stage):
            # Logits and their gradient, in the model's format and in float32.
            found.append(sizes.tokens * model.vocab_size * (element_bytes + FLOAT_BYTES))
    return max(found, default=0)


def _weights_and_gradients(config: Config, stage: int) -> tuple[int, int]:
    """Bytes of a rank's weights, a decoupled encoder's among them, and of the gradients of those trained."""
    layout, model = layout_of(config), config.model
    held = [each for each in vision_parameters(model) if _holds_vision(config, stage, each)]
    for vp_stage in range(layout.vpp):
        if layout.is_first(stage, vp_stage):
            held.append(embedding_parameter(model))
        for layer in layout.layer_ids(stage, vp_stage):
            held += layer_parameters(model, layer)
        if layout.is_last(stage, vp_stage):
            held += head_parameters(model)
    trained = [*encoder_parameters(config), *stage_parameters(config, layout, stage)]
    weights = sum(_rank_size(config, parameter) for parameter in held)
    gradients = sum(_rank_size(config, parameter) for parameter in trained)
    return weights * WEIGHT_BYTES[config.train.dtype], gradients * GRADIENT_BYTES


def _holds_vision(config: Config, stage: int, parameter: TrainedParameter) -> bool:
    return stage == 0 or VisionPart.of(parameter.name) in config.vision_placement.encoder_parts


def _rank_size(config: Config, parameter: TrainedParameter) -> int:
    return parameter.size // (config.parallelism.ep if parameter.is_expert else 1)
