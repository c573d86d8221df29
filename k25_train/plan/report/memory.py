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
from k25_train.plan.memory.node import fullest_node, node_memories
from k25_train.plan.memory.outside import communicators_in
from k25_train.plan.memory.stage import chunk_memory, fullest, most_imbalance, room_bytes
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.tower import most_chunk_patches
from k25_train.plan.memory.verdict import judge_memory
from k25_train.plan.pass_sizes import balanced_sizes
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.report.text import format_gb, format_layers, format_shape
from k25_train.plan.time.passes import pass_times
from k25_train.units import GB, GIB
from parallel.config import DepSchedule


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
        passes = (memory.saved, memory.outputs, memory.buffer, memory.working, memory.exchanged)
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
    yield "always", "gradients in float32", memory.gradients
    yield "always", "masters and moments", memory.optimizer_on_device
    yield "pipeline", f"activations of {memory.num_held} passes", memory.saved
    yield "pipeline", "chunk outputs", memory.outputs
    yield "pipeline", "activations on their way to the host and back", memory.buffer
    yield "pipeline", "a layer or the head at work", memory.working
    yield "pipeline", "tokens on their way to experts and back", memory.exchanged
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


def memory_lines(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> Iterator[str]:
    """Whether the fullest stage fits and what it leaves, or what would help."""
    worst, config, cluster = fullest(memories), pipeline.config, pipeline.config.cluster
    # 1. What was counted, and where offloaded activations go.
    yield (
        "Saved: activations from forward to backward, tokens spread over experts evenly, a sequence as one "
        "document. One layer at work is an upper bound. Nothing of it was measured on a GPU."
    )
    most_host = max(memory.host for memory in memories)
    if most_host:
        yield (
            f"Host memory for activations: {format_gb(most_host)} GB per rank at most, "
            f"{format_gb(most_host * cluster.gpus_per_node)} GB on a node with {cluster.gpus_per_node} such."
        )
        yield copy_line(pipeline, memories)
    yield checkpoint_line(pipeline)
    yield host_line(pipeline, memories)
    # 2. Whether the device has room for all of it.
    if cluster.gpu_memory_gb is None:
        return
    if config.dep.schedule is DepSchedule.bubbles and config.vision_placement.trained_encoder_parts:
        yield chunk_line(pipeline)
    stage, left = pipeline.stages[worst.stage], room_bytes(config, worst)
    in_phase = max(worst.phases.values())
    what = "activations" if worst.fullest_phase == "pipeline" else f"the phase {worst.fullest_phase}"
    held = f"{format_gb(worst.states)} GB of states and {format_gb(in_phase)} of {what}"
    rest = f"{format_gb(worst.device - worst.tensors)} for CUDA, NCCL and gaps between tensors"
    if left >= 0:
        yield (
            f"FITS: stage {worst.stage} is the fullest. Of {cluster.gpu_memory_gb:g} GB, {held} leave "
            f"{format_gb(left)} next to {rest}. Its experts may get {most_imbalance(stage, worst):.2f} times "
            "their share of tokens in every pass."
        )
        return
    yield (
        f"DOES NOT FIT: stage {worst.stage} has {held}, with {rest} {format_gb(-left)} more than "
        f"{cluster.gpu_memory_gb:g}. {remedy_line(pipeline)}"
    )


def checkpoint_line(pipeline: PipelinePlan) -> str:
    """How large a checkpoint is, what of it a rank writes, and what a save and a load take of the host."""
    config = pipeline.config
    shard, buffers = fullest_shard(pipeline), load_buffer_bytes(config.checkpoint)
    return (
        f"Checkpoint: {format_gb(checkpoint_bytes(config))} GB, of which a rank writes {format_gb(shard)} at "
        f"most, from a copy of as many in the host; a load reads through {format_gb(buffers)} GB per rank. "
        "Neither takes memory of the device."
    )


def host_line(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> str:
    """All that the ranks of the fullest node keep in its memory, item by item."""
    node, cluster = fullest_node(node_memories(pipeline, memories)), pipeline.config.cluster
    items = {
        "activations": node.of_ranks.activations,
        "optimizer state": node.of_ranks.optimizer,
        "a checkpoint's copy": node.of_ranks.snapshot,
        "buffers of checkpoints": node.of_ranks.loading,
        "steps read ahead": node.of_ranks.batches,
        "processes": node.of_ranks.processes,
        "tensors": node.of_ranks.tensors,
    }
    told = ", ".join(f"{format_gb(num_bytes)} GB of {what}" for what, num_bytes in items.items() if num_bytes)
    return (
        f"Node {node.first} has the most in its host memory, {format_gb(node.total)} GB of "
        f"{format_gb(cluster.host_memory_gib * GIB)}: {told}."
    )


def chunk_line(pipeline: PipelinePlan) -> str:
    """Which chunks of the encoder keep their activations in bubbles."""
    config, memory = pipeline.config, chunk_memory(pipeline)
    largest = most_chunk_patches(config)
    kept = memory.most_joined(largest) if memory.keeps(1) else 0
    return (
        f"Encoder in bubbles: chunks of up to {kept:,} patches keep their activations between their steps "
        f"({format_gb(memory.room_bytes)} GB for all that wait on a rank); larger ones, up to {largest:,}, "
        "keep the inputs of blocks and run each block once more."
    )


def remedy_line(pipeline: PipelinePlan) -> str:
    """The overrides that make it fit, or which help the most if none does."""
    found = judge_memory(pipeline).remedy
    if found is None or not found.overrides:
        return "Use more nodes or larger GPUs."
    what = "This fits" if found.fits else "No choice of memory alone makes it fit; the most that helps"
    what += f", with {format_gb(found.left_bytes)} GB to spare" if found.fits else ""
    return f"{what}: {' '.join(found.overrides)}"


def copy_line(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> str:
    """How long the copies of the stage with the most of them take, and how long it computes meanwhile."""
    cluster = pipeline.config.cluster
    most = max(memories, key=lambda memory: memory.copied)
    copy_s = most.copied / (GB * cluster.host_copy_gb_per_s)
    passes = pass_times(pipeline)
    chunks = range(most.stage, passes.num_chunks, len(pipeline.stages))
    compute_s = sum(
        passes.alone(chunk, is_forward).busy_s["compute"] for chunk in chunks for is_forward in (True, False)
    )
    return (
        f"Copies: stage {most.stage} sends {format_gb(most.copied)} GB of a micro-batch to the host and "
        f"back, {1e3 * copy_s:.1f} ms each way at cluster.host_copy_gb_per_s={cluster.host_copy_gb_per_s:g}, "
        f"and computes for {1e3 * compute_s:.1f} ms"
        + ("." if copy_s <= compute_s else ": it waits for copies. Offload less.")
    )


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
