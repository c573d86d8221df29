"""What is saved of activations, and what every stage holds, as tables, lines of text and JSON; torch-free.

GB are 10^9 bytes, as in data sheets.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table

from k25_train.config.schema import Config
from k25_train.plan.memory.activations import (
    PackedTensor,
    WaitingBytes,
    pack_all,
    saved_tensors,
)
from k25_train.plan.memory.checkpoint import checkpoint_bytes, fullest_shard, load_buffer_bytes
from k25_train.plan.memory.outside import communicators_in
from k25_train.plan.memory.stage import fullest, room_bytes
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.pass_sizes import balanced_sizes
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.text import format_gb, format_layers, format_shape


def packed_by_part(config: Config) -> dict[str, list[PackedTensor]]:
    """Part of the model -> what it saves of a micro-batch if tokens are spread evenly over experts."""
    lists, model = saved_tensors(config, balanced_sizes(config)), config.model
    saved = {}
    if model.num_dense_layers:
        saved["dense layer"] = lists.layer(is_moe=False)
    if model.num_moe_layers:
        saved["MoE layer"] = lists.layer(is_moe=True)
    saved |= {
        "once per chunk": lists.every_chunk(range(config.model.num_layers)),
        "first chunk": lists.first_chunk(),
        "last chunk": lists.last_chunk(),
    }
    return {part: pack_all(config, tensors) for part, tensors in saved.items()}


def part_table(config: Config, part: str, tensors: Sequence[PackedTensor]) -> Table:
    """One row per tensor; equal ones share a row."""
    tokens, total = config.train.seq_len * config.train.micro_batch_size, WaitingBytes.of(tensors)
    table = Table(
        title=f"{part}, {tokens:,} tokens", title_justify="left", show_footer=True, box=box.SIMPLE_HEAD
    )
    table.add_column("activation", footer="total", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    sums = (total.device, total.host, (total.device + total.host) // tokens)
    for name, number in zip(("device bytes", "host bytes", "per token"), sums, strict=True):
        table.add_column(name, footer=f"{number:,}", justify="right", no_wrap=True)
    for packed, count in Counter(tensors).items():
        shape = format_shape(packed.tensor.shape) or "scalar"
        numbers = (count * packed.device_bytes, count * packed.host_bytes)
        table.add_row(
            packed.tensor.name,
            shape if count == 1 else f"{count} of {shape}",
            packed.policy.value,
            *(f"{number:,}" if number else "-" for number in (*numbers, sum(numbers) // tokens)),
        )
    return table


def stage_table(config: Config, memories: Sequence[StageMemory]) -> Table:
    """One row per stage: the peaks of a rank in GB, the fullest marked."""
    title = f"{config.model.name} on {config.world_size:,} ranks: GB per rank"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("stage ", no_wrap=True)
    table.add_column("layers ", no_wrap=True)
    has_limit = config.cluster.gpu_memory_gb is not None
    columns = [
        "passes\nheld",
        "states",
        "saved",
        "chunk\noutputs",
        "copy\nbuffer",
        "one layer\nat work",
        "expert\nexchange",
        "vision",
        "gaps, CUDA,\nNCCL",
        "sum",
    ]
    for name in (*columns, *(["left"] if has_limit else []), "in the\nhost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = fullest(memories)
    for memory in memories:
        working = memory.working + memory.shared_keys
        passes = (memory.saved, memory.outputs, memory.buffer, working, memory.exchanged)
        outside = memory.device - memory.tensors
        held = (memory.states, *passes, memory.features + memory.tower, outside, memory.device)
        left = [room_bytes(config, memory)] if has_limit else []
        table.add_row(
            str(memory.stage),
            " | ".join(map(format_layers, memory.layers)),
            str(memory.num_held),
            *(f" {format_gb(number) if number else '-'}" for number in (*held, *left, memory.host)),
            " ◄" if memory is most else "",
        )
    return table


def item_table(config: Config, memory: StageMemory) -> Table:
    """Everything on the device of one stage, a row each, with what is left."""
    table = Table(
        title=f"stage {memory.stage}, item by item", title_justify="left", box=box.SIMPLE_HEAD, padding=0
    )
    for name in ("when ", "what "):
        table.add_column(name, no_wrap=True)
    table.add_column("GB", justify="right", no_wrap=True)
    for when, what, num_bytes in items_of(config, memory):
        table.add_row(f"{when} ", f"{what} ", format_gb(num_bytes) if num_bytes else "-")
    return table


def items_of(config: Config, memory: StageMemory) -> Iterator[tuple[str, str, float]]:
    """(when, what, bytes) of everything on a stage's device, the total and what is left."""
    yield "always", "weights, with the encoder's", memory.weights
    if memory.quantized:
        yield "always", "experts as INT4 has them", memory.quantized
    yield "always", "gradients in float32", memory.gradients
    yield "always", "masters and moments", memory.optimizer_on_device
    yield "pipeline", f"activations of {memory.num_held} passes", memory.saved
    yield "pipeline", "chunk outputs", memory.outputs
    yield "pipeline", "activations on their way to the host and back", memory.buffer
    yield "pipeline", "a layer or the head at work", memory.working
    yield "pipeline", "tokens on their way to experts and back", memory.exchanged
    yield "pipeline", "keys and values of other ranks, with gradients", memory.shared_keys
    yield "pipeline", "features of images, and their gradients", memory.features
    yield "pipeline", "chunks of the encoder in bubbles", memory.tower
    yield "encoder", "a chunk with its activations, and features", memory.encoding
    yield "optimizer", "rounds of Muon and Newton-Schulz", memory.updating
    yield "", f"fullest phase: {memory.fullest_phase}, with states", memory.tensors
    yield "always", "gaps between tensors (estimate)", memory.gaps
    yield "always", "CUDA's context (estimate)", memory.context
    yield "always", f"{len(communicators_in(config))} communicators of NCCL (estimate)", memory.nccl
    yield "", "total", memory.device
    if config.cluster.gpu_memory_gb is not None:
        yield "", f"margin to {config.cluster.gpu_memory_gb:g} GB", room_bytes(config, memory)


def memory_as_dict(config: Config, memories: Sequence[StageMemory]) -> dict[str, object]:
    """Saved tensors and the memory of every stage, for JSON."""
    parts = packed_by_part(config)
    pipeline = plan_pipeline(config)
    return {
        "checkpoint": {
            "bytes": checkpoint_bytes(config),
            "rank_bytes": round(fullest_shard(pipeline)),
            "load_buffer_bytes": load_buffer_bytes(config.checkpoint),
        },
        "tokens": config.train.seq_len * config.train.micro_batch_size,
        "parts": {part: [_tensor_as_dict(packed) for packed in tensors] for part, tensors in parts.items()},
        "stages": [
            asdict(memory)
            | {"layers": [list(layers) for layers in memory.layers], "device": memory.device}
            | {"tensors": memory.tensors, "gaps": memory.gaps, "fullest_phase": memory.fullest_phase}
            | ({} if config.cluster.gpu_memory_gb is None else {"left": room_bytes(config, memory)})
            for memory in memories
        ],
    }


def _tensor_as_dict(packed: PackedTensor) -> dict[str, object]:
    return {
        "name": packed.tensor.name,
        "shape": list(packed.tensor.shape),
        "policy": packed.policy.value,
        "device_bytes": packed.device_bytes,
        "host_bytes": packed.host_bytes,
    }
