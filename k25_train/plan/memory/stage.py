"""What one rank of each pipeline stage holds on its device while it trains, and in the host; torch-free.

What a rank holds from step to step is exact (`states.py`). On top of it come, one after another, the
pipeline's passes, the encoder before and after them, and the optimizer's rounds: the largest counts. A
checkpoint takes none, an evaluation, which only goes forward, less than training. What is no tensor's is
estimated (`outside.py`). Nothing of this was measured on a GPU; what ranks have at their peaks is in
`metrics.jsonl`, next to the plan (`training/device_memory.py`).
"""

from collections.abc import Iterable
from dataclasses import replace

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.memory.activations import num_held
from k25_train.plan.memory.checkpoint import snapshot_bytes
from k25_train.plan.memory.expert_exchange import exchange_bytes
from k25_train.plan.memory.offload import OffloadBudget, budget_for, offload_need
from k25_train.plan.memory.outside import GAPS, context_bytes, gaps_share, nccl_bytes
from k25_train.plan.memory.pipeline_peak import output_bytes, saved_bytes, working_bytes
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.memory.shared_keys import shared_key_bytes
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.states import StageStates, chunk_parameters, pipeline_states
from k25_train.plan.memory.tower import bubble_bytes, bubble_memory, feature_bytes, upfront_bytes
from k25_train.plan.pass_sizes import balanced_sizes
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.units import GB, MIB
from parallel.config import DepSchedule
from parallel.dep.chunk_memory import ROOM_FOR_ALL, ChunkMemory

ROUNDS_AT_WORK = 10
"""Buffers of a round of Muon on the device: its pieces as sent and received, its updates as sent and
received, and either of the rounds before and after it (`parallel/muon/exchange.py`); master and momentum of
two rounds, if they rest in the host (`parallel/host/state_stream.py`)."""
MATRICES_AT_WORK = 4
"""Float32 matrices in Newton-Schulz: the one that is orthogonalised, its update and two products."""


def stage_memories(pipeline: PipelinePlan) -> list[StageMemory]:
    """The memory of every stage if tokens are spread over experts as assumed."""
    alone, config = _without_bubbles(pipeline), pipeline.config
    if config.dep.schedule is not DepSchedule.bubbles or not config.vision_placement.encoder_parts:
        return alone
    tower = bubble_bytes(config, _free_bytes(config, alone))
    return [replace(memory, tower=tower) for memory in alone]


def chunk_memory(pipeline: PipelinePlan) -> ChunkMemory:
    """How chunks of the encoder share the room in bubbles, on all ranks alike."""
    config = pipeline.config
    if config.cluster.gpu_memory_gb is None:
        return ROOM_FOR_ALL
    return bubble_memory(config, _free_bytes(config, _without_bubbles(pipeline)))


def _without_bubbles(pipeline: PipelinePlan) -> list[StageMemory]:
    states = pipeline_states(pipeline)
    return [_stage_memory(*each) for each in zip(pipeline.stages, states, strict=True)]


def _free_bytes(config: Config, alone: Iterable[StageMemory]) -> float:
    """What the fullest stage leaves for chunks of the encoder; nothing where that is not known."""
    if config.cluster.gpu_memory_gb is None:
        return 0.0
    least = min(room_bytes(config, memory) for memory in alone)
    return least / (1 + GAPS)


def _stage_memory(stage: StagePlan, states: StageStates) -> StageMemory:
    """The memory of one stage, without the encoder in bubbles."""
    config, code, sizes = stage.config, stage.assumptions.code, stage.balanced_sizes
    need = offload_need(stage)
    budget = budget_for(config.activation, need) if config.activation.offloads else OffloadBudget(0, 0)
    features, in_host = feature_bytes(stage), config.optim.offload is OptimizerOffload.cpu
    is_upfront = config.dep.schedule is DepSchedule.upfront and bool(config.vision_placement.encoder_parts)
    return StageMemory(
        stage=stage.stage,
        layers=tuple(chunk.layers for chunk in stage.chunks),
        num_held=num_held(stage),
        weights=states.weights,
        quantized=states.quantized,
        gradients=states.gradients,
        optimizer=max(states.optimizer),
        optimizer_on_device=0 if in_host else max(states.optimizer),
        optimizer_in_host=max(states.in_host) if in_host else 0,
        saved=saved_bytes(stage, sizes),
        outputs=output_bytes(stage),
        buffer=budget.device_bytes,
        working=working_bytes(stage, sizes),
        exchanged=exchange_bytes(stage, sizes),
        shared_keys=shared_key_bytes(config, sizes),
        features=features.in_pipeline,
        tower=0,
        encoding=upfront_bytes(config) + features.while_encoding if is_upfront else 0,
        updating=_updating(stage),
        gaps_share=gaps_share(config, code),
        context=context_bytes(config),
        nccl=nccl_bytes(config, code),
        host=budget.host_bytes,
        snapshot=round(snapshot_bytes(stage)),
        copied=round(need.micro_batch_bytes),
    )


def with_imbalance(stage: StagePlan, memory: StageMemory, imbalance: float) -> StageMemory:
    """The same if the rank's experts get `imbalance` times their even share of tokens in every pass."""
    sizes = balanced_sizes(stage.config, replace(stage.assumptions, expert_imbalance=imbalance))
    return replace(
        memory,
        saved=saved_bytes(stage, sizes),
        working=working_bytes(stage, sizes),
        exchanged=exchange_bytes(stage, sizes),
    )


def fullest(memories: Iterable[StageMemory]) -> StageMemory:
    """The first stage with the most on its device."""
    return max(memories, key=lambda memory: memory.device)


def room_bytes(config: Config, memory: StageMemory) -> float:
    """Device memory that is left; negative if there is too little."""
    assert config.cluster.gpu_memory_gb is not None, "the CPU has no memory of its own"
    return config.cluster.gpu_memory_gb * GB - memory.device


def most_imbalance(stage: StagePlan, memory: StageMemory) -> float:
    """How many times their even share of tokens a stage's experts may get in every pass until room ends.

    0 if there is none even now; at most the number of expert-parallel ranks, if all tokens fit.
    """

    def fits(imbalance: float) -> bool:
        return room_bytes(stage.config, with_imbalance(stage, memory, imbalance)) >= 0

    low, high = 0.0, stage.largest_sizes.expert_rows / stage.balanced_sizes.expert_rows
    if fits(high):
        return high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _updating(stage: StagePlan) -> int:
    """Muon's rounds, and Newton-Schulz of the largest matrix: at most."""
    largest, total = 0, 0
    trained = [each for chunk in stage.chunks for each in chunk_parameters(stage, chunk)]
    for each in (*trained, *stage.parameters.encoder):
        if each.matrix_size:
            largest, total = max(largest, each.matrix_size), total + each.size
    of_round = min(stage.config.optim.muon.exchange_mib * MIB, FLOAT_BYTES * total)
    return ROUNDS_AT_WORK * of_round + MATRICES_AT_WORK * FLOAT_BYTES * largest
