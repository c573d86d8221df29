"""What is saved of activations, and what every stage holds, as tables, in words and as JSON; torch-free.

GB are 10^9 bytes, as data sheets have them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.flops import FORWARD_AND_BACKWARD, layer_forward_flops
from k25_train.plan.memory.activations import (
    StoredTensor,
    WaitingBytes,
    balanced_sizes,
    saved_tensors,
    stage_tensors,
    store_all,
)
from k25_train.plan.memory.stage import OVERHEAD_BYTES, StageMemory, fullest, most_imbalance, room_bytes
from k25_train.plan.optimizer import sizes
from k25_train.plan.time.step import flops_per_s
from parallel.activations.policy import Policy

GB = 10**9


def parts(config: Config) -> dict[str, list[StoredTensor]]:
    """What layers of each kind store of a micro-batch, and chunks besides, experts sharing tokens evenly."""
    lists, model = saved_tensors(config, balanced_sizes(config)), config.model
    saved = {}
    if model.num_dense_layers:
        saved["dense layer"] = lists.layer(is_moe=False)
    if model.num_moe_layers:
        saved["MoE layer"] = lists.layer(is_moe=True)
    saved |= {
        "once a chunk": lists.every_chunk(),
        "first chunk": lists.first_chunk(),
        "last chunk": lists.last_chunk(),
    }
    return {part: store_all(config, tensors) for part, tensors in saved.items()}


def part_table(config: Config, part: str, tensors: Sequence[StoredTensor]) -> Table:
    """One row a tensor; alike ones share a row."""
    tokens, total = config.train.seq_len * config.train.micro_batch_size, WaitingBytes.of(tensors)
    table = Table(
        title=f"{part}, {tokens:,} tokens", title_justify="left", show_footer=True, box=box.SIMPLE_HEAD
    )
    table.add_column("activation", footer="total", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    sums = (total.device, total.host, (total.device + total.host) // tokens)
    for name, number in zip(("device bytes", "host bytes", "a token"), sums, strict=True):
        table.add_column(name, footer=f"{number:,}", justify="right", no_wrap=True)
    for stored, count in Counter(tensors).items():
        shape = sizes(stored.tensor.shape) or "scalar"
        numbers = (count * stored.device_bytes, count * stored.host_bytes)
        table.add_row(
            stored.tensor.name,
            shape if count == 1 else f"{count} of {shape}",
            stored.policy.value,
            *(f"{number:,}" if number else "-" for number in (*numbers, sum(numbers) // tokens)),
        )
    return table


def stage_table(config: Config, memories: Sequence[StageMemory]) -> Table:
    """One row a stage: the peaks of a rank in GB, the fullest marked."""
    title = f"{config.model.name} on {config.world_size:,} ranks: GB a rank"
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
            " | ".join(map(layer_numbers, memory.layers)),
            str(memory.num_held),
            *(f" {gb(number)}" for number in numbers),
            " ◄" if memory is most else "",
        )
    return table


def verdict(config: Config, memories: Sequence[StageMemory]) -> Iterator[str]:
    """What the fullest stage leaves, or what is too much, and what can be done."""
    worst, cluster = fullest(memories), config.cluster
    yield (
        "Saved: activations from forward to backward, tokens spread over experts evenly, a sequence as one "
        "document. One layer at work is an upper bound. Nothing of it was measured on a GPU."
    )
    most_host = max(memory.host for memory in memories)
    if most_host:
        yield (
            f"Host memory for activations: {gb(most_host)} GB a rank at most, "
            f"{gb(most_host * cluster.gpus_per_node)} GB on a node with {cluster.gpus_per_node} such."
        )
        yield copies(config, memories)
    if cluster.gpu_memory_gb is None:
        return
    left = room_bytes(config, worst)
    held = f"{gb(worst.states)} GB of states and {gb(worst.activations)} of activations"
    rest = f"{gb(OVERHEAD_BYTES)} for CUDA, NCCL and gaps between tensors"
    if left >= 0:
        yield (
            f"FITS: stage {worst.stage} is the fullest. Of {cluster.gpu_memory_gb:g} GB, {held} leave "
            f"{gb(left)} beside {rest}. Its experts may get {most_imbalance(config, worst):.2f} times their "
            "share of tokens in every pass."
        )
        return
    yield (
        f"DOES NOT FIT: stage {worst.stage} has {held}, with {rest} {gb(-left)} more than "
        f"{cluster.gpu_memory_gb:g}. What would help: {'; '.join(remedies(config, worst))}."
    )


def copies(config: Config, memories: Sequence[StageMemory]) -> str:
    """How long copies of the stage with the most of them take, beside what it computes meanwhile."""
    train, cluster = config.train, config.cluster
    most = max(memories, key=lambda memory: memory.copied)
    copy_s = most.copied / (1e9 * cluster.host_copy_gb_per_s)
    forward_flops = sum(
        layer_forward_flops(config.model, layer, [train.seq_len] * train.micro_batch_size)
        for layers in most.layers
        for layer in layers
    )
    compute_s = FORWARD_AND_BACKWARD * forward_flops / flops_per_s(config)
    return (
        f"Copies: stage {most.stage} sends {gb(most.copied)} GB of a micro-batch to the host and back, "
        f"{1e3 * copy_s:.1f} ms each way at cluster.host_copy_gb_per_s={cluster.host_copy_gb_per_s:g}, and "
        f"computes for {1e3 * compute_s:.1f} ms at cluster.model_tflops={cluster.model_tflops:g}"
        + ("." if copy_s <= compute_s else ": it waits for copies. Offload less.")
    )


def remedies(config: Config, memory: StageMemory) -> Iterator[str]:
    """What would take the most off the device."""
    held = Counter[str]()
    for chunk in stage_tensors(config, memory.stage, balanced_sizes(config)):
        for stored in chunk:
            held[stored.tensor.name] += stored.device_bytes
    policies = config.activation.policies()
    for name, _ in held.most_common(2):
        offloaded = Policy.fp8_offload if policies[name].compresses else Policy.offload
        yield f"activation.{name}={offloaded.value} ({gb(held[name])} GB in a pass through all chunks)"
    if config.optim.offload is OptimizerOffload.none:
        yield f"optim.offload=cpu ({gb(memory.optimizer)} GB); more nodes, which share optimizer state"


def gb(num_bytes: float) -> str:
    """Bytes in GB."""
    size = num_bytes / GB
    return f"{size:,.0f}" if abs(size) >= 100 else f"{size:.2f}" if abs(size) >= 0.1 else f"{size:.4f}"


def layer_numbers(layers: range) -> str:
    """A chunk's layers: 3-5, 4, or a dash."""
    if len(layers) < 2:
        return str(layers.start) if layers else "-"
    return f"{layers.start}-{layers.stop - 1}"


def as_dict(config: Config, memories: Sequence[StageMemory]) -> dict[str, object]:
    """All of it, for JSON."""
    return {
        "tokens": config.train.seq_len * config.train.micro_batch_size,
        "parts": {part: [_tensor(stored) for stored in tensors] for part, tensors in parts(config).items()},
        "stages": [
            asdict(memory)
            | {"layers": [list(layers) for layers in memory.layers], "device": memory.device}
            | ({} if config.cluster.gpu_memory_gb is None else {"left": room_bytes(config, memory)})
            for memory in memories
        ],
    }


def _tensor(stored: StoredTensor) -> dict[str, object]:
    return {
        "name": stored.tensor.name,
        "shape": list(stored.tensor.shape),
        "policy": stored.policy.value,
        "device_bytes": stored.device_bytes,
        "host_bytes": stored.host_bytes,
    }
