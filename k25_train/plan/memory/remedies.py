"""Which overrides make a configuration fit its devices: tried, not guessed; torch-free."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.memory.activations import stage_tensors
from k25_train.plan.memory.stage import fullest, room_bytes, stage_memories
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.units import GB
from parallel.activations.policy import Policy
from parallel.config import DepSchedule

MOST_OVERRIDES = 6
"""After so many, a configuration counts as one that does not fit."""
SPARE_BYTES = 2 * GB
"""What a remedy should leave, for experts that get more tokens than others."""
NUM_TRIED = 3
"""Of the activations that hold the most, so many are tried."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """Overrides in the order in which they help."""

    overrides: list[str]
    left_bytes: float
    """What they leave on the fullest stage's device; negative if it is still too little."""

    @property
    def fits(self) -> bool:
        """Whether all stages fit with them."""
        return self.left_bytes >= 0


def fitting_overrides(config: Config) -> Remedy:
    """Overrides that make a configuration fit.

    At each turn the one that leaves the most; at the last, of those that leave `SPARE_BYTES`, the one with
    the fewest bytes to copy.
    """
    chosen: list[str] = []
    state = _State.of(config)
    while state.left_bytes < 0 and len(chosen) < MOST_OVERRIDES:
        tried = [(key, _State.of(changed)) for key, changed in _levers(state.pipeline)]
        better = [(key, each) for key, each in tried if each.left_bytes > state.left_bytes]
        if not better:
            break
        enough = [(key, each) for key, each in better if each.left_bytes >= SPARE_BYTES]
        key, state = (
            min(enough, key=lambda found: found[1].copied_bytes)
            if enough
            else max(better, key=lambda found: found[1].left_bytes)
        )
        chosen.append(key)
    return Remedy(chosen, state.left_bytes)


@dataclass(frozen=True, slots=True)
class _State:
    """What a configuration leaves on the fullest stage's device, and copies to the host on any."""

    pipeline: PipelinePlan
    left_bytes: float
    copied_bytes: int

    @classmethod
    def of(cls, config: Config) -> "_State":
        pipeline = plan_pipeline(config)
        memories = stage_memories(pipeline)
        return cls(pipeline, room_bytes(config, fullest(memories)), max(each.copied for each in memories))


def _levers(pipeline: PipelinePlan) -> Iterator[tuple[str, Config]]:
    """(override, configuration with it) of everything that takes less of a device."""
    config = pipeline.config
    # 1. What waits on the fullest stage's device goes to the host.
    stage = pipeline.stages[fullest(stage_memories(pipeline)).stage]
    held = Counter[str]()
    for chunk in stage_tensors(stage, stage.balanced_sizes):
        for packed in chunk:
            held[packed.tensor.name] += packed.device_bytes
    policies = config.activation.policies()
    for name, _ in held.most_common(NUM_TRIED):
        offloaded = Policy.fp8_offload if policies[name].compresses else Policy.offload
        if not policies[name].offloads:
            key = f"activation.{name}"
            yield f"{key}={offloaded.value}", _with(config, key, offloaded)
    # 2. Optimizer state, features and chunks of the encoder.
    if config.optim.offload is OptimizerOffload.none:
        yield "optim.offload=cpu", _with(config, "optim.offload", OptimizerOffload.cpu)
    if config.vision_placement.encoder_parts:
        if config.dep.feature_buffer_gib:
            yield "dep.feature_buffer_gib=0", _with(config, "dep.feature_buffer_gib", 0.0)
        if config.dep.schedule is DepSchedule.bubbles:
            yield "dep.schedule=upfront", _with(config, "dep.schedule", DepSchedule.upfront)


def _with(section: Any, key: str, value: object) -> Any:
    """The same section with another value of a dotted key."""
    name, _, rest = key.partition(".")
    return replace(section, **{name: _with(getattr(section, name), rest, value) if rest else value})
