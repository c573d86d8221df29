"""What it takes to bring a model's weights from the trainer to its engines: bytes and seconds; torch-free.

    every rank: reads its weights, packs experts ─► its share to the host ─► broadcast to every GPU
                │ device memory                     │ PCIe                   │ network, NVLink, reload

Moonshot's checkpoint-engine works like this: all parameters go to all GPUs, and each engine keeps what is its
own of every bucket (K2, section 3.3). What a broadcast and a reload take is fitted to its published runs
(`PUBLISHED`), since neither is at the rate of any one link; everything else is bytes by rate.
"""

from dataclasses import dataclass
from math import prod

from k25_train.config.basics import DType
from k25_train.config.model import ModelConfig
from k25_train.config.rollout import EngineWeights
from k25_train.config.schema import Config
from k25_train.parameters import table
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from k25_train.units import GB, GIB

INT4_BYTES = 0.5 + 2 / 32
"""Bytes of an INT4 weight: its code, and its part of the scale in bfloat16 that 32 weights share."""
BUCKET_BYTES = 8 * GIB
"""checkpoint-engine's default bucket. A GPU holds one for what comes from the host and two that it shares
with its engine."""
NUM_BUCKETS = 3
START_S = 1.4
"""Seconds of a broadcast whatever the size: the plan of buckets, its agreement, the engine's start and end.
Fitted to `PUBLISHED`."""
BROADCAST_GB_PER_S = {True: 99.0, False: 74.0}
"""Whether all GPUs are of one node -> 1e9 bytes a second that each of them receives and its engine reloads.
Fitted to `PUBLISHED`."""
FILE_GB_PER_S = 5.0
"""1e9 bytes a second that one process writes to shared memory, or reads from it. Source: our choice."""
PER_EXPERT_READS = 3
"""Times that a weight's bytes pass through device memory to be packed: largest weight, codes, packing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPush:
    """A weight update that somebody has published."""

    what: str
    """Model, format and machines."""
    num_bytes: float
    """Bytes of the weights."""
    is_one_node: bool
    """Whether these were of one node."""
    seconds: float
    """What was measured, by broadcast."""


PUBLISHED = tuple(
    PublishedPush(what=what, num_bytes=size * GB, is_one_node=gpus <= 8, seconds=seconds)
    for what, size, gpus, seconds in (
        ("GLM-4.5-Air BF16, 8 H800", 221, 8, 3.47),
        ("Qwen3-235B BF16, 8 H800", 470, 8, 6.22),
        ("DeepSeek-V3.1 FP8, 16 H20", 689, 16, 10.19),
        ("Kimi-K2 FP8, 16 H20", 1029, 16, 14.36),
        ("DeepSeek-V3.1 FP8, 256 H20", 689, 256, 11.33),
        ("Kimi-K2 FP8, 256 H20", 1029, 256, 16.04),
    )
)
"""Source: README of MoonshotAI/checkpoint-engine, table of benchmarks (415c320), and the sizes of the
released checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedBytes:
    """Weights of a model as engines get them."""

    experts: int
    """Bytes of routed experts."""
    rest: int
    """Bytes of everything else, the vision part included."""
    num_experts: int
    """Weights of routed experts."""
    num_rest: int
    """All others, the routers' correction biases included."""

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.experts + self.rest


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """A push by one way."""

    way: str
    """`rollout.transport`."""
    num_bytes: int
    """Bytes of the weights."""
    pack_s: float
    """Seconds in which each rank reads and packs its weights."""
    to_host_s: float
    """Seconds in which its share gets to the host."""
    send_s: float
    """Seconds until all engines have all of it, loaded."""
    device_bytes: int
    """Device memory that it takes on each GPU while it lasts."""
    host_bytes: int
    """Host memory of each node."""

    @property
    def seconds(self) -> float:
        """All of it; nothing overlaps."""
        return self.pack_s + self.to_host_s + self.send_s


def pushed_bytes(model: ModelConfig, weights: EngineWeights) -> PushedBytes:
    """Bytes of a model's weights in a number format of engines."""
    experts = rest = num_experts = num_rest = 0
    width = 4 if weights is EngineWeights.float32 else 2
    for entry, _ in table.TABLE.places(model):
        copies = len(entry.released) * (model.num_experts if entry.is_expert else 1)
        number = copies * prod(entry.released_shape(model))
        if entry.is_expert:
            num_experts += number
            experts += round(number * INT4_BYTES) if weights is EngineWeights.int4 else number * width
        else:
            num_rest += number
            rest += number * (4 if entry.dtype == "float32" else width)
    return PushedBytes(experts=experts, rest=rest, num_experts=num_experts, num_rest=num_rest)


def broadcast_s(num_bytes: float, *, is_one_node: bool) -> float:
    """Seconds in which checkpoint-engine brings so many bytes to every GPU and engines load them."""
    return START_S + num_bytes / (BROADCAST_GB_PER_S[is_one_node] * GB)


def plan_pushes(config: Config, weights: EngineWeights) -> tuple[PushPlan, ...]:
    """A push of the model from the ranks of the configuration to engines on the same GPUs, by each way."""
    pushed, cluster = pushed_bytes(config.model, weights), config.cluster
    total, num_nodes = pushed.total, cluster.nodes
    is_one_node = num_nodes == 1
    rates = cluster.rates
    # 1. Each rank reads its own weights; replicas of a stage divide what they have alike.
    own = (pushed.num_experts + pushed.num_rest) * WEIGHT_BYTES[DType(config.train.dtype)] / config.world_size
    passes = PER_EXPERT_READS if weights is EngineWeights.int4 else 1
    memory = (rates.memory_gb_per_s or FILE_GB_PER_S) * GB * rates.memory_efficiency
    pack_s = own * passes / memory
    share = total / config.world_size
    pcie = (rates.pcie_gb_per_s or cluster.host_copy_gb_per_s) * GB
    network = cluster.network_gb_per_s * GB
    file = FILE_GB_PER_S * GB
    return (
        PushPlan(
            way="checkpoint_engine",
            num_bytes=total,
            pack_s=pack_s,
            to_host_s=share / pcie,
            send_s=broadcast_s(total, is_one_node=is_one_node),
            device_bytes=NUM_BUCKETS * min(BUCKET_BYTES, total),
            host_bytes=-(-total // num_nodes),
        ),
        # 2. One tensor after another is broadcast from who has it, at the rate of one card.
        PushPlan(
            way="nccl",
            num_bytes=total,
            pack_s=pack_s,
            to_host_s=0.0,
            send_s=START_S + total / (network if not is_one_node else (rates.nvlink_gb_per_s or 50.0) * GB),
            device_bytes=2 * min(BUCKET_BYTES, total),
            host_bytes=0,
        ),
        # 3. All through the first rank, written once and read by the engines of its node: for small models.
        PushPlan(
            way="shared_memory",
            num_bytes=total,
            pack_s=pack_s,
            to_host_s=total / (network if not is_one_node else pcie),
            send_s=2 * total / file,
            device_bytes=0,
            host_bytes=2 * total,
        ),
    )
