"""Host memory of a node: everything that its ranks keep there; torch-free.

Pages that the system caches of files are not counted: it gives them back.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from k25_train.config.cluster import Device
from k25_train.config.data import ReadIn
from k25_train.config.vision import VisionPart
from k25_train.plan.memory.checkpoint import load_buffer_bytes
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.tower import PIXEL_BYTES
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.units import GB, MIB

PROCESS_BYTES = {Device.cpu: GB, Device.cuda: 4 * GB}
"""What a rank's process takes before it trains: Python, torch, megatron-core, and with CUDA its driver's host
side and NCCL's rings. Source: 0.8 GB were resident on a CPU; with CUDA not measured, our choice."""
READER_BYTES = 400 * MIB
"""What each process takes that reads data, before it has read any. Source: our choice, from processes of this
size that were resident on a CPU; much of it is shared with the rank that forked it."""
TOKEN_BYTES = 4 + 4 + 1 + 2
"""Of a token in a step's batch: its number, its label, whether it has a loss, its source
(`k25_train/data/step_batches.py`)."""
WAITING_STEPS = 2
"""Steps in the host in addition to those read ahead: the one that trains and the one in the making."""
REGION_HEADROOM = 1.25
"""By how much memory for a step is larger than what it is made for (`k25_train/data/regions.py`)."""
IN_FLIGHT_BYTES = 256 * MIB
"""What workers have in flight for a rank (`k25_train/data/workers/pool.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHost:
    """What one rank takes of its node's memory, in bytes."""

    activations: float
    """Page-locked memory of offloaded activations."""
    optimizer: float
    """Page-locked masters and moments."""
    snapshot: float
    """Page-locked copy of the state from which a checkpoint is written."""
    loading: float
    """Buffers through which a checkpoint is read or written."""
    batches: float
    """Steps that were read, decoded pixels among them, and what workers have in flight."""
    processes: float
    """The rank's process and those that read for it."""
    tensors: float
    """Tensors of a rank whose device is the CPU."""

    @property
    def locked(self) -> float:
        """What is page-locked: no other program gets it."""
        return self.activations + self.optimizer + self.snapshot

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    @classmethod
    def sum(cls, ranks: Iterable[tuple["RankHost", int]]) -> "RankHost":
        """What so many ranks of each kind take together."""
        each = list(ranks)
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(getattr(rank, name) * count for rank, count in each) for name in names})


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Host memory of nodes whose ranks are of the same stages."""

    first: int
    """The first such node."""
    num_ranks: dict[int, int]
    """Stage -> ranks of it on the node."""
    of_ranks: RankHost
    """Bytes of all its ranks together."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.of_ranks.total


def rank_host(stage: StagePlan, memory: StageMemory) -> RankHost:
    """What each rank of a stage takes of its node's memory."""
    config = stage.config
    readers = config.data.workers + (config.data.read_in is ReadIn.process)
    return RankHost(
        activations=memory.host,
        optimizer=memory.optimizer_in_host,
        snapshot=memory.snapshot,
        loading=load_buffer_bytes(config.checkpoint),
        batches=batch_bytes(stage),
        processes=PROCESS_BYTES[config.cluster.device] + readers * READER_BYTES,
        tensors=memory.tensors if config.cluster.device is Device.cpu else 0,
    )


def batch_bytes(stage: StagePlan) -> float:
    """Steps of input that wait in the host: words of first and last stages, pixels of what the rank encodes.

    A decoupled encoder's items are spread over all ranks; a coupled one's are with the first stage. Each of
    the ranks that share sequences reads all of their words.
    """
    config, train = stage.config, stage.config.train
    of_replica = train.global_batch_size * train.seq_len / config.dp
    has_words = stage.chunks[0].is_first or stage.chunks[-1].is_last
    of_step = TOKEN_BYTES * of_replica if has_words else 0.0
    # Patches of this rank in a step: of the ranks that share a sequence, each has the images of its tokens.
    patches = stage.assumptions.vision_share * of_replica * config.model.vision.merge_size**2
    patches /= config.parallelism.cp
    if VisionPart.tower in config.vision_placement.encoder_parts:
        patches /= config.parallelism.pp
    elif stage.stage > 0:
        patches = 0.0
    of_step += patches * 3 * config.model.vision.patch_size**2 * PIXEL_BYTES
    in_flight = IN_FLIGHT_BYTES if config.data.workers else 0
    return (config.data.prefetch_steps + WAITING_STEPS) * REGION_HEADROOM * of_step + in_flight


def node_memories(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> list[NodeMemory]:
    """Every different node of the job, in order. megatron-core numbers ranks stage by stage."""
    config, ranks_of_node = pipeline.config, pipeline.config.cluster.gpus_per_node
    of_stage = [rank_host(*each) for each in zip(pipeline.stages, memories, strict=True)]
    found: dict[tuple[tuple[int, int], ...], NodeMemory] = {}
    for node in range(config.cluster.nodes):
        ranks = range(node * ranks_of_node, (node + 1) * ranks_of_node)
        num_ranks = Counter(rank // config.dp_cp for rank in ranks)
        key = tuple(sorted(num_ranks.items()))
        if key not in found:
            of_ranks = RankHost.sum((of_stage[stage], count) for stage, count in key)
            found[key] = NodeMemory(node, dict(key), of_ranks)
    return list(found.values())


def fullest_node(nodes: Iterable[NodeMemory]) -> NodeMemory:
    """The first node with the most."""
    return max(nodes, key=lambda node: node.total)
