"""What ranks of a stage keep from step to step, to the byte: weights, gradients, optimizer state; torch-free.

Held against the ranks that the dry run builds (tests/distributed/test_dryrun.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from k25_train.config.model import Quantization
from k25_train.config.optimizer import OptimName
from k25_train.config.schema import Config
from k25_train.plan.assumptions import OtherCode, Sharding
from k25_train.plan.memory.buffers import BufferPlan, bucket_elements, plan_buffer
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.parameters import RuledParameter
from k25_train.plan.pipeline import ChunkPlan, PipelinePlan, StagePlan
from k25_train.plan.weight_bytes import HOST_MASTER_BYTES, MASTER_BYTES, WEIGHT_BYTES

NUM_MOMENTS = {OptimName.adamw: 2, OptimName.muonclip: 1}
"""Tensors that an update remembers of a weight, next to its master."""
STEP_BYTES = 4
"""The count of steps that torch's optimizers keep for each shard of a parameter."""
ROUTER_BYTES = 8 + FLOAT_BYTES
"""Of an expert in a router's buffers: tokens that it got, summed in float64, and its bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStates:
    """What each rank of a stage keeps, in bytes."""

    weights: int
    """Weights with their padding, frozen ones, a decoupled encoder's among them; buffers of routers, and
    tables of cosines and sines, which each layer has where RoPE is stretched."""
    quantized: int
    """Copies of routed experts as INT4 has them (`model.quantization`)."""
    gradients: int
    """Gradients of the trained weights, padding included."""
    optimizer: tuple[int, ...]
    """[data-parallel rank] -> masters and moments on the device."""
    in_host: tuple[int, ...]
    """[data-parallel rank] -> the same where they rest in the host (`optim.offload=cpu`)."""


@dataclass(slots=True)
class _Module:
    """A chunk, or an encoder."""

    weights: int = 0
    quantized: int = 0
    gradients: int = 0
    buffers: list[tuple[BufferPlan, OptimName, bool]] = field(default_factory=list)


def pipeline_states(pipeline: PipelinePlan) -> list[StageStates]:
    """Those of every stage. Chunks with layers of the same kinds are counted once."""
    config, code = pipeline.config, pipeline.assumptions.code
    parameters = pipeline.stages[0].parameters
    encoder = _module(config, code, parameters.encoder, config.world_size, None)
    of_encoder = [(buffer.shards(), update) for buffer, update, _ in encoder.buffers]
    known: dict[tuple[object, ...], _Module] = {}
    states: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
    found = []
    for stage in pipeline.stages:
        keys = [_key(stage, number, chunk) for number, chunk in enumerate(stage.chunks)]
        for key, chunk in zip(keys, stage.chunks, strict=True):
            if key not in known:
                known[key] = _chunk(stage, chunk, has_buckets=bool(key[0]))
        modules = [known[key] for key in keys]
        if tuple(keys) not in states:
            states[tuple(keys)] = _optimizer(config, code, modules)
        on_device, in_host = (list(each) for each in states[tuple(keys)])
        first = stage.stage * config.dp_cp
        for shards, update in of_encoder:
            _add_state(config, code, update, shards[first : first + config.dp_cp], on_device, in_host)
        found.append(
            StageStates(
                weights=sum(each.weights for each in (*modules, encoder)),
                quantized=sum(each.quantized for each in modules),
                gradients=sum(each.gradients for each in (*modules, encoder)),
                optimizer=tuple(on_device),
                in_host=tuple(in_host),
            )
        )
    return found


def _key(stage: StagePlan, number: int, chunk: ChunkPlan) -> tuple[object, ...]:
    """What makes chunks differ. Only the first chunk of the first stage reduces bucket by bucket."""
    has_buckets = stage.stage == 0 and number == 0 and stage.config.parallelism.overlap_grad_reduce
    kinds = tuple(stage.config.model.is_moe(layer) for layer in chunk.layers)
    return (has_buckets, kinds, chunk.is_first, chunk.is_last)


def chunk_parameters(stage: StagePlan, chunk: ChunkPlan) -> Iterator[RuledParameter]:
    """The parameters of a chunk, in the order of its modules."""
    if chunk.is_first:
        yield from stage.parameters.first_stage_vision
        yield from stage.parameters.embedding
    for layer in chunk.layers:
        yield from stage.parameters.layer(layer)
    if chunk.is_last:
        yield from stage.parameters.head
        for _ in range(stage.assumptions.code.mtp_layers):
            yield from stage.parameters.mtp


def _chunk(stage: StagePlan, chunk: ChunkPlan, *, has_buckets: bool) -> _Module:
    config = stage.config
    # Its size follows from replicas alone (`distributed_data_parallel.py`), its shards from all of a stage.
    bucket_size = bucket_elements(config.dp) if has_buckets else None
    listed = list(chunk_parameters(stage, chunk))
    found = _module(config, stage.assumptions.code, listed, config.dp_cp, bucket_size)
    model = config.model
    if model.quantization is Quantization.int4_qat:
        of_rank = sum(each.size // config.parallelism.ep for each in listed if each.is_expert)
        found.quantized = of_rank * WEIGHT_BYTES[config.train.dtype]
    found.weights += sum(map(model.is_moe, chunk.layers)) * model.num_experts * ROUTER_BYTES
    if model.rope.scaling_factor > 1:
        table = model.rope.original_max_position * model.qk_rope_head_dim * FLOAT_BYTES
        found.weights += len(chunk.layers) * 2 * table
    return found


def _module(
    config: Config,
    code: OtherCode,
    parameters: Sequence[RuledParameter],
    num_ranks: int,
    bucket_size: int | None,
) -> _Module:
    """A module that so many ranks have, of which every ep-th has the same experts."""
    ep, element = config.parallelism.ep, WEIGHT_BYTES[config.train.dtype]
    found = _Module()
    found.weights = element * sum(
        each.size // (ep if each.is_expert else 1) for each in parameters if each.update is None
    )
    for update in OptimName:
        for is_expert in (False, True):
            sizes = [
                each.size // (ep if is_expert else 1)
                for each in parameters
                if each.update is update and each.is_expert is is_expert
            ]
            if not sizes:
                continue
            num_shards = num_ranks // (ep if is_expert else 1)
            buffer = plan_buffer(sizes, num_shards, bucket_size)
            on_rank = buffer.num_elements
            if code.sharding is Sharding.weights:
                on_rank = -(-on_rank // num_shards)
            found.weights += element * on_rank
            found.gradients += code.gradient_bytes * on_rank
            found.buffers.append((buffer, update, is_expert))
    return found


def _optimizer(config: Config, code: OtherCode, modules: Sequence[_Module]) -> tuple[list[int], list[int]]:
    """[data-parallel rank] -> bytes of optimizer state on the device, and in the host."""
    on_device, in_host = [0] * config.dp_cp, [0] * config.dp_cp
    for module in modules:
        for buffer, update, is_expert in module.buffers:
            shards: Sequence[tuple[int, int]] = buffer.shards()
            if is_expert:
                # Ranks with other experts hold as much.
                shards = [shard for shard in shards for _ in range(config.parallelism.ep)]
            _add_state(config, code, update, shards, on_device, in_host)
    return on_device, in_host


def _add_state(
    config: Config,
    code: OtherCode,
    update: OptimName,
    shards: Sequence[tuple[int, int]],
    on_device: list[int],
    in_host: list[int],
) -> None:
    """Add the state of each rank's elements and parts of parameters."""
    moments_bytes = NUM_MOMENTS[update] * code.moment_bytes
    device_bytes, host_bytes = (
        MASTER_BYTES[config.train.dtype] + moments_bytes,
        HOST_MASTER_BYTES + moments_bytes,
    )
    for rank, (elements, parts) in enumerate(shards):
        on_device[rank] += elements * device_bytes + parts * STEP_BYTES
        in_host[rank] += elements * host_bytes
