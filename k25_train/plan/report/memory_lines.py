"""What memory amounts to, in sentences: what was counted, whether it fits, what would help; torch-free.

GB are 10^9 bytes, as in data sheets.
"""

from collections.abc import Iterator, Sequence

from k25_train.plan.memory.checkpoint import checkpoint_bytes, fullest_shard, load_buffer_bytes
from k25_train.plan.memory.node import fullest_node, node_memories
from k25_train.plan.memory.room import Fit
from k25_train.plan.memory.stage import chunk_memory, most_imbalance, room_bytes
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.tower import most_chunk_patches
from k25_train.plan.memory.verdict import MemoryVerdict
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.report.text import format_gb
from k25_train.plan.time.passes import pass_times
from k25_train.units import GB, GIB
from parallel.config import DepSchedule


def memory_lines(pipeline: PipelinePlan, verdict: MemoryVerdict) -> Iterator[str]:
    """Whether devices and nodes have room and what is left of them, or what would help."""
    config, cluster, memories = pipeline.config, pipeline.config.cluster, verdict.memories
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
    # 2. Whether there is room for all of it.
    if cluster.gpu_memory_gb is None:
        return
    if config.dep.schedule is DepSchedule.bubbles and config.vision_placement.trained_encoder_parts:
        yield chunk_line(pipeline)
    yield verdict_line(pipeline, verdict)


def verdict_line(pipeline: PipelinePlan, verdict: MemoryVerdict) -> str:
    """How a plan fits devices that have memory of their own, and nodes."""
    config, worst = pipeline.config, verdict.memories[verdict.stage]
    stage, left = pipeline.stages[worst.stage], room_bytes(config, worst)
    in_phase = max(worst.phases.values())
    what = "activations" if worst.fullest_phase == "pipeline" else f"the phase {worst.fullest_phase}"
    held = f"{format_gb(worst.states)} GB of states and {format_gb(in_phase)} of {what}"
    rest = f"{format_gb(worst.device - worst.tensors)} for CUDA, NCCL and gaps between tensors"
    head, help_ = verdict.fit.value.upper(), remedy_text(verdict)
    if left < 0:
        return (
            f"{head}: stage {worst.stage} has {held}, with {rest} {format_gb(-left)} more than "
            f"{config.cluster.gpu_memory_gb:g}. {help_}"
        )
    node_left = verdict.node_limit_bytes - verdict.node_bytes
    if node_left < 0:
        return f"{head}: a node has {format_gb(-node_left)} GB too little host memory. {help_}"
    told = (
        f"{head}: stage {worst.stage} is the fullest. Of {config.cluster.gpu_memory_gb:g} GB, {held} leave "
        f"{format_gb(left)} next to {rest}. Its experts may get {most_imbalance(stage, worst):.2f} times "
        "their share of tokens in every pass."
    )
    if verdict.fit is Fit.fits:
        return told
    return f"{told} Of devices and nodes 5% should be left, and room for experts that get more. {help_}"


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


def remedy_text(verdict: MemoryVerdict) -> str:
    """The overrides that make it fit, or which help the most if none does."""
    found = verdict.remedy
    if found is None or not found.overrides:
        return "Use more nodes or larger GPUs."
    what = "This fits" if found.fits else "No choice of memory alone makes it fit; what helps most"
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
