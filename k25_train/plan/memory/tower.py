"""What a decoupled encoder takes on the device: chunks of patches, and features at rest; torch-free.

Every rank has a replica of the encoder (`parallel/dep`). Upfront, a chunk is alone with the rank's states. In
bubbles chunks share the device with the activations of the rank's own passes, so how much they keep between
their steps is bounded by what those leave (`parallel/dep/chunk_memory.py`).
"""

from dataclasses import dataclass

from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.config.vision import VisionConfig, VisionPart
from k25_train.plan.memory.kernels import AttentionKernel, kernels_of
from k25_train.plan.memory.saved_tensor import COMPLEX_BYTES, FLOAT_BYTES
from k25_train.plan.pipeline import StagePlan
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from k25_train.units import GIB
from parallel.config import DepSchedule, WireFormat
from parallel.dep.chunk_memory import ChunkMemory

PIXEL_BYTES = 1
"""Of a value of a patch, which the tower normalises after the copy to the device."""
FEATURE_BYTES = {WireFormat.float32: 4, WireFormat.bfloat16: 2}
SHARE_OF_ROOM = 0.5
"""Share of the device memory that everything else leaves, which suspended chunks may take in bubbles. The
rest is for experts that get more tokens than others. Source: not disclosed, our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchBytes:
    """What a patch takes on the device while the tower goes backward."""

    block: int
    """What one transformer block saves of it."""
    kept: int
    """What all blocks, embedding, last norm and projector save of it."""
    inputs: int
    """What is kept of it if every block is run again: the inputs of blocks, pixels and positions."""

    @property
    def at_work(self) -> int:
        """What the block that goes backward takes at most: what it saves, each with its gradient."""
        return 2 * self.block


def patch_bytes(vision: VisionConfig, dtype: DType, device: Device, *, has_projector: bool) -> PatchBytes:
    """What the encoder saves of a patch; held against autograd in tests/unit/plan/test_tower_memory.py.

    What does not grow with patches, weights by which the table of positions is resampled, is not counted.
    """
    # 1. Numbers in the model's format, and statistics of norms, a mean and a deviation each.
    element, width, heads = WEIGHT_BYTES[dtype], vision.hidden_size, vision.num_attention_heads
    kernels = kernels_of(device, dtype, transformer_engine=False)
    norm = 2 * (FLOAT_BYTES if kernels.norm_statistics_in_float32 else element)
    # 2. A block saves input and output of both norms, the joint projection of queries, keys and values,
    #    rotated queries and keys, attention's output and the same joined, both sides of GELU, and logarithms
    #    of sums.
    #    One call for all items gives its output joined already.
    joined = kernels.vision_attention is not AttentionKernel.varlen
    block = ((10 + joined) * width + 2 * vision.ffn_hidden_size) * element + 2 * norm + heads * FLOAT_BYTES
    # 3. Once: pixels, rotations, and the last norm's input.
    pixels, rotations = 3 * vision.patch_size**2, width // heads // 2 * COMPLEX_BYTES
    kept = vision.num_layers * block + (pixels + width) * element + rotations + norm
    # 4. The projector's norm, what its two matrices and GELU read; tokens are squares of patches.
    if has_projector:
        kept += 4 * width * element + norm
    inputs = (vision.num_layers - 1) * width * element + pixels * PIXEL_BYTES + rotations
    return PatchBytes(block=block, kept=kept, inputs=inputs)


def encoder_patch_bytes(config: Config) -> PatchBytes:
    """The same for the decoupled encoder of a configuration."""
    parts = config.vision_placement.encoder_parts
    has_projector = VisionPart.projector in parts
    return patch_bytes(
        config.model.vision, config.train.dtype, config.cluster.device, has_projector=has_projector
    )


def largest_item_patches(vision: VisionConfig) -> int:
    """Patches of the largest image, or chunk of a video, that there can be."""
    return max(vision.image_patch_limit, vision.pos_emb_time * vision.frame_patch_limit)


def most_chunk_patches(config: Config) -> int:
    """Patches of the largest chunk that there can be: `dep.max_patches_per_chunk`, or one larger item."""
    return max(config.dep.max_patches_per_chunk, largest_item_patches(config.model.vision))


def upfront_bytes(config: Config) -> int:
    """What a chunk takes that goes backward after the pipeline, with all its activations."""
    if not config.vision_placement.trained_encoder_parts:
        # Forward alone: a block's tensors, then the next one's.
        return 0 if not config.vision_placement.encoder_parts else _at_work(config)
    return most_chunk_patches(config) * encoder_patch_bytes(config).kept + _at_work(config) // 2


def bubble_memory(config: Config, free_bytes: float) -> ChunkMemory:
    """How chunks share the room in bubbles, of the bytes that everything else leaves free on the device."""
    each = encoder_patch_bytes(config)
    room = SHARE_OF_ROOM * max(free_bytes - _at_work(config), 0.0)
    return ChunkMemory(room_bytes=room, kept_bytes=each.kept, input_bytes=each.inputs)


def bubble_bytes(config: Config, free_bytes: float) -> int:
    """What chunks take on the device in bubbles at most: suspended ones, and the block of one at work."""
    if not config.vision_placement.trained_encoder_parts:
        return _at_work(config) if config.vision_placement.encoder_parts else 0
    largest, each = most_chunk_patches(config), encoder_patch_bytes(config)
    # A chunk that does not fit with all its activations keeps the inputs of blocks, and is alone if need be.
    shared = min(bubble_memory(config, free_bytes).room_bytes, largest * each.kept)
    return round(max(shared, largest * each.inputs)) + _at_work(config)


def _at_work(config: Config) -> int:
    return most_chunk_patches(config) * encoder_patch_bytes(config).at_work


@dataclass(frozen=True, slots=True)
class FeatureBytes:
    """Features of images, and their gradients, at rest or in flight on one rank."""

    while_encoding: int
    """Before or after the pipeline."""
    in_pipeline: int
    """While the pipeline runs."""


def feature_bytes(stage: StagePlan) -> FeatureBytes:
    """The features on a rank of a stage: what it has encoded and, on a first stage, what the pipeline takes.

    Of all tokens `Assumptions.vision_share` are images'. A first stage keeps up to
    `dep.feature_buffer_gib`, and has a
    micro-batch of nothing but images in flight and another in use.
    """
    config = stage.config
    if not config.vision_placement.encoder_parts:
        return FeatureBytes(0, 0)
    wire_format = config.dep.exchange_dtype or WireFormat(config.train.dtype.value)
    of_token = config.vision_placement.feature_width * FEATURE_BYTES[wire_format]
    of_batch = stage.balanced_sizes.tokens * of_token
    of_step = stage.num_micro_batches * of_batch * config.dp_cp
    # What a rank has encoded waits until its micro-batch is sent.
    encoded = round(stage.assumptions.vision_share * of_step / config.world_size)
    if stage.stage > 0:
        return FeatureBytes(encoded, encoded if config.dep.schedule is DepSchedule.bubbles else 0)
    kept = min(round(config.dep.feature_buffer_gib * GIB), stage.num_micro_batches * of_batch)
    in_use = 2 * of_batch
    in_bubbles = encoded if config.dep.schedule is DepSchedule.bubbles else 0
    return FeatureBytes(encoded + kept + in_use, in_bubbles + kept + in_use)
