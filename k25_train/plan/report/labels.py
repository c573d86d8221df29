"""Short names of what takes time and memory, for screens and plots."""

from collections.abc import Iterator

from k25_train.plan.cause import Cause
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.report.bars import Amount
from k25_train.plan.time.step_plan import StepPlan
from k25_train.units import GB

LABEL_WIDTH = 19
"""No label is longer: two columns of rows fit 80 characters."""
CAUSES = {
    Cause.compute: "products, attention",
    Cause.recompute: "recomputation",
    Cause.memory_bound: "data-moving kernels",
    Cause.storage: "FP8 storage",
    Cause.host: "host launches",
    Cause.experts: "expert exchange",
    Cause.context: "sequence exchange",
    Cause.pipeline: "stage messages",
    Cause.data_parallel: "gradients, weights",
    Cause.offload: "host copies",
    Cause.bubble: "pipeline idle",
    Cause.encoder: "vision encoder",
    Cause.optimizer: "optimizer",
    Cause.quantization: "experts to INT4",
    Cause.between_steps: "between steps",
    Cause.data: "data not there",
    Cause.checkpoint: "checkpoints",
}
STATES = {
    "weights": "weights",
    "quantized": "experts as INT4",
    "gradients": "gradients",
    "optimizer_on_device": "masters, moments",
}
PHASES = {
    "pipeline": {
        "saved": "saved activations",
        "outputs": "chunk outputs",
        "buffer": "copies in flight",
        "working": "a layer at work",
        "exchanged": "tokens for experts",
        "shared_keys": "other ranks' keys",
        "features": "image features",
        "tower": "encoder in bubbles",
    },
    "encoder": {"encoding": "encoder's chunk"},
    "optimizer": {"updating": "optimizer's rounds"},
}
"""Phase of a step -> fields of `StageMemory` that it takes on top of states."""
OUTSIDE = {"gaps": "allocator's gaps", "context": "CUDA", "nccl": "NCCL"}


def time_amounts(step: StepPlan) -> list[Amount]:
    """Seconds of a step by cause."""
    return [Amount(CAUSES[part.cause], part.seconds) for part in step.parts]


def memory_amounts(memory: StageMemory) -> list[Amount]:
    """GB on a device by item, when it is fullest; they add up to all that is on it."""
    amounts = [Amount(label, num_bytes / GB) for label, num_bytes in _items(memory)]
    rest = memory.device / GB - sum(each.value for each in amounts)
    return [*amounts, *([Amount("others", rest)] if rest > 0.005 else [])]


def _items(memory: StageMemory) -> Iterator[tuple[str, float]]:
    fields = {**STATES, **PHASES.get(memory.fullest_phase, {}), **OUTSIDE}
    for name, label in fields.items():
        yield label, getattr(memory, name)
