"""Changes of a configuration that take less of a device or of a node; torch-free."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from k25_train.config.activation import CAN_RECOMPUTE
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.memory.activations import stage_tensors
from k25_train.plan.memory.room import Fit, Room
from k25_train.plan.pipeline import PipelinePlan
from parallel.activations.policy import Policy
from parallel.config import DepSchedule

NUM_TRIED = 3
"""Of the activations that hold the most, so many are tried."""
SELECTIVE = dict.fromkeys(CAN_RECOMPUTE, Policy.recompute)
"""`activation=selective`, on top of `keep`; a test holds it against the file."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a configuration."""

    overrides: tuple[str, ...]
    """As on the command line."""
    config: Config
    """The configuration with it."""


def changes_of(pipeline: PipelinePlan, room: Room) -> Iterator[Change]:
    """Everything that takes less of where there is too little."""
    config = pipeline.config
    # 1. Activations wait elsewhere, or are made again; smaller micro-batches have fewer.
    if room.of_device is not Fit.fits:
        yield from _of_activations(pipeline, room)
        yield from _of_device(config)
    # 2. What is in the host stays on the device.
    if room.of_node is not Fit.fits:
        yield from _of_node(pipeline)
    # 3. Fewer of everything for each rank.
    if config.train.micro_batch_size > 1 and config.train.micro_batch_size % 2 == 0:
        yield _change(config, "train.micro_batch_size", config.train.micro_batch_size // 2)
    # Twice as many replicas share the optimizer's state, where the batch has sequences for all of them.
    per_replica = config.train.micro_batch_size * 2 * config.dp
    if config.train.global_batch_size % per_replica == 0:
        yield _change(config, "cluster.nodes", 2 * config.cluster.nodes)


def _of_activations(pipeline: PipelinePlan, room: Room) -> Iterator[Change]:
    config, stage = pipeline.config, pipeline.stages[room.worst.stage]
    held = held_by_name([packed for chunk in stage_tensors(stage, stage.balanced_sizes) for packed in chunk])
    policies, largest = config.activation.policies(), [name for name, _ in held.most_common()]
    # 1. A recipe, where nothing is chosen yet.
    if config.activation.keeps_all:
        yield Change(("activation=selective",), with_policies(config, SELECTIVE))
    # 2. Those that hold the most are made again, or wait in the host.
    for name in [name for name in largest if name in CAN_RECOMPUTE][:NUM_TRIED]:
        yield _change(config, f"activation.{name}", Policy.recompute)
    for name in [name for name in largest if not policies[name].offloads][:NUM_TRIED]:
        offloaded = Policy.fp8_offload if policies[name].compresses else Policy.offload
        yield _change(config, f"activation.{name}", offloaded)


def held_by_name(tensors: Any) -> Counter[str]:
    """Name -> bytes that wait on the device."""
    held = Counter[str]()
    for packed in tensors:
        if packed.device_bytes:
            held[packed.tensor.name] += packed.device_bytes
    return held


def _of_device(config: Config) -> Iterator[Change]:
    """Optimizer state, features, chunks of the encoder, a forward pass that runs ahead."""
    if config.optim.offload is OptimizerOffload.none:
        yield _change(config, "optim.offload", OptimizerOffload.cpu)
    if config.parallelism.overlap_expert_comm:
        # Weight gradients can only be delayed in the overlapped schedule.
        alone = _change(config, "parallelism.delay_wgrad", False)
        change = _change(alone.config, "parallelism.overlap_expert_comm", False)
        yield Change((*alone.overrides, *change.overrides), change.config)
    if config.vision_placement.encoder_parts:
        if config.dep.feature_buffer_gib:
            yield _change(config, "dep.feature_buffer_gib", 0.0)
        if config.dep.schedule is DepSchedule.bubbles:
            yield _change(config, "dep.schedule", DepSchedule.upfront)


def _of_node(pipeline: PipelinePlan) -> Iterator[Change]:
    config = pipeline.config
    if config.optim.offload is OptimizerOffload.cpu:
        yield _change(config, "optim.offload", OptimizerOffload.none)
    policies = config.activation.policies()
    in_host = Counter[str]()
    for stage in pipeline.stages[:1]:
        for chunk in stage_tensors(stage, stage.balanced_sizes):
            for packed in chunk:
                in_host[packed.tensor.name] += packed.host_bytes
    for name, _ in in_host.most_common(NUM_TRIED):
        if policies[name].offloads:
            kept = Policy.fp8 if policies[name].compresses else Policy.keep
            yield _change(config, f"activation.{name}", kept)
    if config.data.prefetch_steps > 1:
        yield _change(config, "data.prefetch_steps", 1)


def with_policies(config: Config, policies: Mapping[str, Policy]) -> Config:
    """The configuration with other policies of some activations."""
    for name, policy in policies.items():
        config = _with(config, f"activation.{name}", policy)
    return config


def _change(config: Config, key: str, value: Any) -> Change:
    told = getattr(value, "value", value)
    text = str(told).lower() if isinstance(told, bool) else f"{told:g}" if isinstance(told, float) else told
    return Change((f"{key}={text}",), _with(config, key, value))


def _with(section: Any, key: str, value: object) -> Any:
    """The same section with another value of a dotted key."""
    name, _, rest = key.partition(".")
    return replace(section, **{name: _with(getattr(section, name), rest, value) if rest else value})
