"""Changes of a configuration that take less of a device or of a node; torch-free."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from k25_train.config.activation import CAN_RECOMPUTE, CHEAP_TO_RECOMPUTE
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.evaluations import with_evaluations
from k25_train.plan.memory.activations import stage_tensors
from k25_train.plan.memory.room import Fit, Room
from k25_train.plan.pipeline import PipelinePlan
from parallel.activations.policy import Policy
from parallel.config import DepSchedule

NUM_TRIED = 3
"""Of the activations that hold the most, so many are tried."""
IN_FP8 = frozenset("moe.up_input moe.swiglu_input shared_expert.swiglu_input dense.swiglu_input".split())
"""What K2's recipe stores in FP8."""


def recipes_of(names: Iterable[str]) -> dict[str, dict[str, Policy]]:
    """The recipes of `conf/activation` but that of long stages, from the one that holds the most on; a test
    holds them against their files."""
    made_again = dict.fromkeys(CHEAP_TO_RECOMPUTE, Policy.recompute)
    keep = dict.fromkeys(names, Policy.keep)
    k2 = dict.fromkeys(keep, Policy.offload) | dict.fromkeys(IN_FP8, Policy.fp8) | made_again
    return {
        "keep": keep,
        "selective": keep | made_again,
        "k2": k2,
        "k2_fp8_offload": k2 | {"moe.up_input": Policy.fp8_offload},
    }


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
    yield from _of_nodes(config)


def _of_activations(pipeline: PipelinePlan, room: Room) -> Iterator[Change]:
    config, stage = pipeline.config, pipeline.stages[room.worst.stage]
    held = held_by_name([packed for chunk in stage_tensors(stage, stage.balanced_sizes) for packed in chunk])
    policies, largest = config.activation.policies(), [name for name, _ in held.most_common()]
    # 1. Another recipe, where policies are those of one: after it, policies set one by one would still count.
    recipes = recipes_of(policies)
    if policies in recipes.values():
        for name in list(recipes)[list(recipes.values()).index(policies) + 1 :]:
            yield Change((f"activation={name}",), with_policies(config, recipes[name]))
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


def _of_nodes(config: Config) -> Iterator[Change]:
    """Twice as many replicas share the optimizer's state, where the batch has micro-batches for all of them,
    as many as the schedule needs."""
    train, sizes = config.train, config.parallelism
    of_all = train.micro_batch_size * 2 * config.dp
    needed = sizes.pp if sizes.vpp > 1 else 2 if sizes.overlap_expert_comm else 1
    if train.global_batch_size % of_all or train.global_batch_size < needed * of_all:
        return
    change = _change(config, "cluster.nodes", 2 * config.cluster.nodes)
    changed, overrides = with_evaluations(change.config), [*change.overrides]
    if changed.train.eval_sequences != train.eval_sequences:
        overrides.append(f"train.eval_sequences={changed.train.eval_sequences}")
    yield Change(tuple(overrides), changed)


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
