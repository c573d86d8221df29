"""What is saved of activations, and what every stage holds, as tables, lines of text and JSON; torch-free.

GB are 10^9 bytes, as in data sheets.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.memory.activations import (
    PackedTensor,
    WaitingBytes,
    pack_all,
    saved_tensors,
    stage_tensors,
)
from k25_train.plan.memory.stage import OVERHEAD_BYTES, StageMemory, fullest, most_imbalance, room_bytes
from k25_train.plan.pass_sizes import balanced_sizes
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.report.text import format_gb, format_layers, format_shape
from k25_train.plan.time.step import layers_s
from k25_train.units import GB
from parallel.activations.policy import Policy


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
        "sum",
    ]
    for name in (*columns, *(["left"] if has_limit else []), "in the\nhost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = fullest(memories)
    for memory in memories:
        held = (memory.states, memory.saved, memory.outputs, memory.buffer, memory.working, memory.device)
        left = [room_bytes(config, memory)] if has_limit else []
        numbers = (*held, *left, memory.host)
        table.add_row(
            str(memory.stage),
            " | ".join(map(format_layers, memory.layers)),
            str(memory.num_held),
            *(f" {format_gb(number)}" for number in numbers),
            " ◄" if memory is most else "",
        )
    return table


def memory_lines(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> Iterator[str]:
    """Whether the fullest stage fits and what it leaves, or what would help."""
    worst, cluster = fullest(memories), pipeline.config.cluster
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
    # 2. Whether the device has room for all of it.
    if cluster.gpu_memory_gb is None:
        return
    stage, left = pipeline.stages[worst.stage], room_bytes(pipeline.config, worst)
    held = f"{format_gb(worst.states)} GB of states and {format_gb(worst.activations)} of activations"
    rest = f"{format_gb(OVERHEAD_BYTES)} for CUDA, NCCL and gaps between tensors"
    if left >= 0:
        yield (
            f"FITS: stage {worst.stage} is the fullest. Of {cluster.gpu_memory_gb:g} GB, {held} leave "
            f"{format_gb(left)} next to {rest}. Its experts may get {most_imbalance(stage, worst):.2f} times "
            "their share of tokens in every pass."
        )
        return
    yield (
        f"DOES NOT FIT: stage {worst.stage} has {held}, with {rest} {format_gb(-left)} more than "
        f"{cluster.gpu_memory_gb:g}. What would help: {'; '.join(remedies(stage, worst))}."
    )


def copy_line(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> str:
    """How long the copies of the stage with the most of them take, and how long it computes meanwhile."""
    cluster = pipeline.config.cluster
    most = max(memories, key=lambda memory: memory.copied)
    copy_s = most.copied / (GB * cluster.host_copy_gb_per_s)
    compute_s = layers_s(pipeline.stages[most.stage])
    return (
        f"Copies: stage {most.stage} sends {format_gb(most.copied)} GB of a micro-batch to the host and "
        f"back, {1e3 * copy_s:.1f} ms each way at cluster.host_copy_gb_per_s={cluster.host_copy_gb_per_s:g}, "
        f"and computes for {1e3 * compute_s:.1f} ms at cluster.model_tflops={cluster.model_tflops:g}"
        + ("." if copy_s <= compute_s else ": it waits for copies. Offload less.")
    )


def remedies(stage: StagePlan, memory: StageMemory) -> Iterator[str]:
    """What would take the most off the device."""
    held = Counter[str]()
    for chunk in stage_tensors(stage, stage.balanced_sizes):
        for packed in chunk:
            held[packed.tensor.name] += packed.device_bytes
    policies = stage.config.activation.policies()
    for name, _ in held.most_common(2):
        offloaded = Policy.fp8_offload if policies[name].compresses else Policy.offload
        yield f"activation.{name}={offloaded.value} ({format_gb(held[name])} GB in a pass through all chunks)"
    if stage.config.optim.offload is OptimizerOffload.none:
        yield f"optim.offload=cpu ({format_gb(memory.optimizer)} GB); more nodes, which share optimizer state"


def memory_as_dict(config: Config, memories: Sequence[StageMemory]) -> dict[str, object]:
    """Saved tensors and the memory of every stage, for JSON."""
    parts = packed_by_part(config)
    return {
        "tokens": config.train.seq_len * config.train.micro_batch_size,
        "parts": {part: [_tensor_as_dict(packed) for packed in tensors] for part, tensors in parts.items()},
        "stages": [
            asdict(memory)
            | {"layers": [list(layers) for layers in memory.layers], "device": memory.device}
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
