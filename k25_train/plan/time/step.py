"""How long the parts of a step take, as far as plans need to know; torch-free.

On GPUs passes and the tower take what their kernels do, and passes what no other work hides
(`time/passes.py`, `kernels/encoder.py`); on CPUs both take their model FLOPs at one rate. Only
proportions matter to a plan of what runs in the idle times of a pipeline, and it is the same on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.released import count_parameters
from k25_train.plan.flops import encoder_cost, head_forward_flops, layer_forward_flops, tower_cost
from k25_train.plan.kernels.encoder import encoder_kernels
from k25_train.plan.kernels.kernel import Precision
from k25_train.plan.kernels.seconds import kernels_s
from k25_train.plan.memory.tower import FEATURE_BYTES, PIXEL_BYTES
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.expert_exchange import NETWORK_SHARE, nvlink_ranks
from k25_train.plan.time.passes import pass_times
from k25_train.plan.time.ring import ring
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.units import GB
from parallel.config import WireFormat
from parallel.dep.cost import EncoderCost
from parallel.dep.grid import MERGE_EDGE, Grid
from parallel.pipeline.balance import chunk_loads
from parallel.pipeline.schedule import BACKWARD_COST
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Durations, Timeline

USUAL_ROWS = 25
"""Rows and columns of tokens in an image of usual size, half a megapixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTimes:
    """How long images take."""

    config: Config
    """The configuration of the step."""
    gather_s: float
    """How long the tower's weights are gathered."""
    reduce_s: float
    """How long the tower's gradients are reduced."""
    cost: EncoderCost
    """FLOPs of what every rank has of vision."""
    flops_per_s: float
    """At which rate it computes them."""

    def forward_s(self, grid: Grid) -> float:
        """How long an item is encoded."""
        return self.cost.of_item(grid) / self.flops_per_s

    def copy_s(self, grid: Grid) -> float:
        """How long an item's pixels are copied to the device."""
        patch_bytes = 3 * self.config.model.vision.patch_size**2 * PIXEL_BYTES
        return grid.num_patches * patch_bytes / (GB * self.config.cluster.host_copy_gb_per_s)

    def exchange_s(self, num_tokens: int) -> float:
        """How long the features of so many vision tokens are sent to a first stage."""
        wire_format = self.config.dep.exchange_dtype or WireFormat(self.config.train.dtype.value)
        num_bytes = num_tokens * self.config.vision_placement.feature_width * FEATURE_BYTES[wire_format]
        return num_bytes / network_bytes_per_s(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes(VisionTimes):
    """How long a step without images takes, and what images add to it."""

    num_micro_batches: int
    """Micro-batches of the step on each replica."""
    seconds: Durations
    """How long passes take."""
    text: Timeline
    """When the passes of one replica run."""


def decoupled_cost(config: Config) -> EncoderCost:
    """FLOPs of a forward pass of what every rank has of vision: tower and projector, or the tower alone."""
    vision = config.model.vision
    if VisionPart.projector in config.vision_placement.encoder_parts:
        return encoder_cost(vision, config.model.hidden_size)
    return tower_cost(vision)


def encoder_flops_per_s(config: Config) -> float:
    """FLOPs per second of the vision encoder: on GPUs what its kernels reach on images of usual size."""
    if config.cluster.device is Device.cpu:
        return _cpu_flops_per_s(config)
    image = Grid(1, MERGE_EDGE * USUAL_ROWS, MERGE_EDGE * USUAL_ROWS)
    num_images = max(1, config.dep.max_patches_per_chunk // image.num_patches)
    kernels = list(encoder_kernels(config, image, num_images))
    seconds = kernels_s(kernels, config.cluster.rates, Precision.of(config.train.dtype))
    return sum(kernel.flops for kernel in kernels) / seconds


def _cpu_flops_per_s(config: Config) -> float:
    rates = config.cluster.rates
    peak_tflops = rates.float32_tflops if config.train.dtype is DType.float32 else rates.bf16_tflops
    return 1e12 * peak_tflops / rates.calibration.kernels


def network_bytes_per_s(config: Config) -> float:
    """Bytes that a rank sends per second."""
    return GB * config.cluster.network_gb_per_s


def vision_times(config: Config) -> VisionTimes:
    """How long images take."""
    gather_s, reduce_s = _weights_s(config, (WEIGHT_BYTES[config.train.dtype], GRADIENT_BYTES))
    return VisionTimes(
        config=config,
        gather_s=gather_s,
        reduce_s=reduce_s,
        cost=decoupled_cost(config),
        flops_per_s=encoder_flops_per_s(config),
    )


def step_times(pipeline: PipelinePlan) -> StepTimes:
    """The times of a step."""
    config, of_vision = pipeline.config, vision_times(pipeline.config)
    is_cpu = config.cluster.device is Device.cpu
    seconds: Durations = chunk_seconds(pipeline) if is_cpu else pass_times(pipeline)
    return StepTimes(
        config=config,
        gather_s=of_vision.gather_s,
        reduce_s=of_vision.reduce_s,
        cost=of_vision.cost,
        flops_per_s=of_vision.flops_per_s,
        num_micro_batches=pipeline.num_micro_batches,
        seconds=seconds,
        text=simulate([stage.passes for stage in pipeline.stages], seconds),
    )


def chunk_seconds(pipeline: PipelinePlan) -> ChunkSeconds:
    """How long a micro-batch takes in each chunk alone, its sequences as one document each."""
    config, documents = pipeline.config, pipeline.stages[0].balanced_sizes.documents
    if config.cluster.device is Device.cuda:
        passes = pass_times(pipeline)
        forward_s, backward_s = (
            tuple(passes.alone(chunk, is_forward).seconds for chunk in range(passes.num_chunks))
            for is_forward in (True, False)
        )
        return ChunkSeconds(forward_s=forward_s, backward_s=backward_s)
    layers = range(config.model.num_layers)
    loads = chunk_loads(
        tuple(layer_forward_flops(config.model, layer, documents) for layer in layers),
        pipeline.layout.layers_per_chunk,
        0,
        head_forward_flops(config.model, sum(documents)),
    )
    more_s = config.cluster.rates.calibration.pass_ms / 1e3
    # Ranks that share sequences compute an even part each.
    per_s = config.parallelism.cp * _cpu_flops_per_s(config)
    computed_s = [load / per_s for load in loads]
    return ChunkSeconds(
        forward_s=tuple(each + more_s for each in computed_s),
        backward_s=tuple(BACKWARD_COST * each + more_s for each in computed_s),
    )


def _weights_s(config: Config, bytes_each: Sequence[int]) -> list[float]:
    """How long all ranks exchange so many bytes of each of the tower's weights; 0 if it is frozen."""
    if not config.vision_placement.trained_encoder_parts:
        return [0.0] * len(bytes_each)
    num_weights, world = count_parameters(config.model).vision, config.world_size
    # Rates between processes of the CPU are what they reach.
    share = NETWORK_SHARE if config.cluster.device is Device.cuda else 1.0
    near = nvlink_ranks(config, world)
    return [ring(config, num_weights * size, world, near, network_share=share).seconds for size in bytes_each]
