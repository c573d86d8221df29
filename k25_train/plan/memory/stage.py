"""What one rank of each pipeline stage holds on its device while it trains, and in the host; torch-free.

What a rank holds from step to step is exact but for the padding of buffers. On top of it come, one after
another, the pipeline's passes, the encoder before and after them, and the optimizer's rounds: the largest
counts. A checkpoint takes none. What is no tensor's is estimated (`outside.py`). Nothing of this was measured
on a GPU; what ranks have at their peaks is in `metrics.jsonl`, next to the plan
(`training/device_memory.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from k25_train.config.optimizer import OptimizerOffload, OptimName
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.megatron import TrainedParameter, vision_parameters
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.memory.activations import peak_held
from k25_train.plan.memory.checkpoint import snapshot_bytes
from k25_train.plan.memory.expert_exchange import exchange_bytes
from k25_train.plan.memory.offload import OffloadBudget, budget_for, offload_need
from k25_train.plan.memory.outside import GAPS, context_bytes, nccl_bytes
from k25_train.plan.memory.pipeline_peak import output_bytes, rank_size, saved_bytes, working_bytes
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.tower import bubble_bytes, bubble_memory, feature_bytes, upfront_bytes
from k25_train.plan.optimizer import encoder_parameters, stage_parameters, stage_state
from k25_train.plan.pass_sizes import balanced_sizes
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES
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
    """The memory of every stage if tokens are spread evenly over experts."""
    alone = [stage_memory(stage) for stage in pipeline.stages]
    config = pipeline.config
    if config.dep.schedule is not DepSchedule.bubbles or not config.vision_placement.encoder_parts:
        return alone
    tower = bubble_bytes(config, _free_bytes(config, alone))
    return [replace(memory, tower=tower) for memory in alone]


def chunk_memory(pipeline: PipelinePlan) -> ChunkMemory:
    """How chunks of the encoder share the room in bubbles, on all ranks alike."""
    config = pipeline.config
    if config.cluster.gpu_memory_gb is None:
        return ROOM_FOR_ALL
    return bubble_memory(config, _free_bytes(config, map(stage_memory, pipeline.stages)))


def _free_bytes(config: Config, alone: Iterable[StageMemory]) -> float:
    """What the fullest stage leaves for chunks of the encoder; nothing where that is not known."""
    if config.cluster.gpu_memory_gb is None:
        return 0.0
    least = min(room_bytes(config, memory) for memory in alone)
    return least / (1 + GAPS)


def stage_memory(stage: StagePlan) -> StageMemory:
    """The memory of one stage if tokens are spread evenly over experts, without the encoder in bubbles."""
    config, sizes = stage.config, stage.balanced_sizes
    need = offload_need(stage)
    budget = budget_for(config.activation, need) if config.activation.offloads else OffloadBudget(0, 0)
    weights, gradients = _weights_and_gradients(stage)
    optimizer, features = round(stage_state(stage).rank_bytes), feature_bytes(stage)
    is_upfront = config.dep.schedule is DepSchedule.upfront and bool(config.vision_placement.encoder_parts)
    return StageMemory(
        stage=stage.stage,
        layers=tuple(chunk.layers for chunk in stage.chunks),
        num_held=peak_held(stage.sampled_passes, lambda _: 1),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_on_device=0 if config.optim.offload is OptimizerOffload.cpu else optimizer,
        saved=saved_bytes(stage, sizes),
        outputs=output_bytes(stage),
        buffer=budget.device_bytes,
        working=working_bytes(stage, sizes),
        exchanged=exchange_bytes(stage, sizes),
        features=features.in_pipeline,
        tower=0,
        encoding=upfront_bytes(config) + features.while_encoding if is_upfront else 0,
        updating=_updating(stage),
        context=context_bytes(config),
        nccl=nccl_bytes(config),
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
    config, largest, total = stage.config, 0, 0
    for each in _trained(stage):
        rule = rule_of(*each, config.optim, config.model)
        if rule.update is OptimName.muonclip:
            largest = max(largest, each.size // rule.num_matrices)
            total += each.size
    of_round = min(config.optim.muon.exchange_mib * MIB, FLOAT_BYTES * total)
    return ROUNDS_AT_WORK * of_round + MATRICES_AT_WORK * FLOAT_BYTES * largest


def _weights_and_gradients(stage: StagePlan) -> tuple[int, int]:
    """Bytes of a rank's weights, a decoupled encoder's among them, and of the gradients of those trained."""
    config = stage.config
    held = [each for each in vision_parameters(config.model) if _holds_vision(stage, each)]
    held += stage.text_parameters
    weights = sum(rank_size(config, parameter) for parameter in held)
    gradients = sum(rank_size(config, parameter) for parameter in _trained(stage))
    return weights * WEIGHT_BYTES[config.train.dtype], gradients * GRADIENT_BYTES


def _trained(stage: StagePlan) -> Iterator[TrainedParameter]:
    yield from encoder_parameters(stage.config)
    yield from stage_parameters(stage)


def _holds_vision(stage: StagePlan, parameter: TrainedParameter) -> bool:
    return stage.stage == 0 or VisionPart.of(parameter.name) in stage.config.vision_placement.encoder_parts
