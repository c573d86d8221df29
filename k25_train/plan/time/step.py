"""How long the parts of a step take, as far as plans need to know; torch-free.

Passes and the tower take their model FLOPs at one rate, `cluster.model_tflops`. Only proportions matter to
a plan of what runs in the idle times of a pipeline, and it is the same on every rank and in every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.released import count_parameters
from k25_train.plan.flops import encoder_cost, head_forward_flops, layer_forward_flops, tower_cost
from k25_train.plan.layer_costs import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.plan.layout import layout_of
from k25_train.plan.passes import passes_by_stage
from parallel.config import WireFormat
from parallel.dep.cost import EncoderCost
from parallel.dep.grid import Grid
from parallel.pipeline.balance import chunk_loads
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Timeline

PIXEL_BYTES = 4
FEATURE_BYTES = {WireFormat.float32: 4, WireFormat.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step without images, and what takes how long besides."""

    config: Config
    num_micro_batches: int
    seconds: ChunkSeconds
    text: Timeline
    """One replica's passes."""
    gather_s: float
    """Of the tower's weights."""
    reduce_s: float
    """Of the tower's gradients."""
    cost: EncoderCost
    """FLOPs of what stands on every rank."""

    def forward_s(self, grid: Grid) -> float:
        """Encoding an item."""
        return self.cost.of_item(grid) / flops_per_s(self.config)

    def copy_s(self, grid: Grid) -> float:
        """Bringing an item's pixels to the device."""
        patch_bytes = 3 * self.config.model.vision.patch_size**2 * PIXEL_BYTES
        return grid.num_patches * patch_bytes / (1e9 * self.config.cluster.host_copy_gb_per_s)

    def exchange_s(self, num_tokens: int) -> float:
        """Bringing the features of so many vision tokens to a first stage."""
        wire_format = self.config.dep.exchange_dtype or WireFormat(self.config.train.dtype.value)
        num_bytes = num_tokens * self.config.vision_placement.feature_width * FEATURE_BYTES[wire_format]
        return num_bytes / network_bytes_per_s(self.config)


def decoupled_cost(config: Config) -> EncoderCost:
    """FLOPs of a forward pass of what stands on every rank: tower and projector, or the tower alone."""
    vision = config.model.vision
    if VisionPart.projector in config.vision_placement.encoder_parts:
        return encoder_cost(vision, config.model.hidden_size)
    return tower_cost(vision)


def flops_per_s(config: Config) -> float:
    """Model FLOPs that a rank computes in a second."""
    return 1e12 * config.cluster.model_tflops


def network_bytes_per_s(config: Config) -> float:
    """Bytes that a rank sends in a second."""
    return 1e9 * config.cluster.network_gb_per_s


def step_times(config: Config, num_micro_batches: int | None = None) -> StepTimes:
    """The times of a configuration's step, with the micro-batches of its global batch unless told."""
    number = num_micro_batches or config.num_micro_batches
    layout, train = layout_of(config), config.train
    lengths = [train.seq_len] * train.micro_batch_size
    loads = chunk_loads(
        tuple(layer_forward_flops(config.model, layer, lengths) for layer in range(config.model.num_layers)),
        layout.layers_per_chunk,
        0,
        head_forward_flops(config.model, sum(lengths)),
    )
    forward_s = tuple(load / flops_per_s(config) for load in loads)
    seconds = ChunkSeconds(forward_s=forward_s, backward_s=tuple(2 * each for each in forward_s))
    gather_s, reduce_s = _weights_s(config, (WEIGHT_BYTES[train.dtype], GRADIENT_BYTES))
    text, cost = simulate(passes_by_stage(config, number), seconds), decoupled_cost(config)
    return StepTimes(config, number, seconds, text, gather_s, reduce_s, cost)


def _weights_s(config: Config, bytes_each: Sequence[int]) -> list[float]:
    """Exchanging as many bytes as this for each of the tower's weights, among all ranks; none if frozen."""
    if not config.vision_placement.trained_encoder_parts:
        return [0.0] * len(bytes_each)
    num_sent = count_parameters(config.model).vision * (config.world_size - 1) / config.world_size
    return [num_sent * size / network_bytes_per_s(config) for size in bytes_each]
