"""Configurations and assumptions in which one thing is otherwise; torch-free."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from k25_train.config.schema import Config
from k25_train.plan.assumptions import Assumptions
from k25_train.plan.evaluations import with_evaluations
from k25_train.plan.mechanisms import mechanisms_of
from k25_train.plan.offer import Offer
from k25_train.plan.pipeline import PipelinePlan
from parallel.config import DepMode, DepSchedule


class WhatIfKind(Enum):
    """What is otherwise."""

    nodes = "nodes"
    """Number of nodes, with the same global batch."""
    length = "length"
    """Tokens of a sequence, with the same number of tokens in a step."""
    vision = "vision"
    """Share of images' tokens; the tower in the first stage, ahead of the pipeline, or in its bubbles."""
    slow_node = "slow-node"
    """How many times longer the kernels of one node take."""
    network = "network"
    """Bandwidth of a rank's network card."""
    imbalance = "imbalance"
    """Load of the busiest rank's experts over their even share."""
    device = "device"
    """Kind of device."""
    mechanisms = "mechanisms"
    """Each mechanism of the configuration switched off, or on if it is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A configuration to plan, under some assumptions."""

    name: str
    """What is otherwise, in a few words."""
    value: float
    """The same as a number, for a plot; the position where it is none."""
    config: Config
    """The configuration."""
    assumptions: Assumptions
    """What is assumed."""
    series: str = ""
    """Which line of a plot it belongs to, if there are several."""
    note: str = ""
    """What else has to change for it."""


NODES = (32, 64, 128, 256, 512)
LENGTHS = tuple(4096 << doublings for doublings in range(7))
VISION_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SLOW_NODES = (1.0, 1.1, 1.2, 1.5, 2.0)
NETWORK_SHARES = (1.0, 0.75, 0.5, 0.25)
IMBALANCES = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
PLACES = {
    "coupled": (DepMode.coupled, DepSchedule.upfront),
    "upfront": (DepMode.decoupled, DepSchedule.upfront),
    "bubbles": (DepMode.decoupled, DepSchedule.bubbles),
}
"""Where and when the vision tower runs."""

TITLES = {
    WhatIfKind.nodes: "more or fewer nodes, with the same global batch",
    WhatIfKind.length: "longer sequences, with the same tokens per step",
    WhatIfKind.vision: "more or fewer images, by place of the vision tower",
    WhatIfKind.slow_node: "one slow node",
    WhatIfKind.network: "slower network cards",
    WhatIfKind.imbalance: "experts that get more tokens than others, in every layer and micro-batch",
    WhatIfKind.device: "other devices, with the nodes and network of this cluster",
    WhatIfKind.mechanisms: "each mechanism switched the other way",
}


def title_of(kind: WhatIfKind, pipeline: PipelinePlan) -> str:
    """What a table shows."""
    config = pipeline.config
    return f"{config.model.name} on {config.world_size:,} ranks: {TITLES[kind]}"


def variants_of(kind: WhatIfKind, pipeline: PipelinePlan, offer: Offer) -> Iterator[Variant]:
    """Every value of what is otherwise."""
    if kind is WhatIfKind.device:
        yield from _devices(pipeline, offer)
    elif kind is WhatIfKind.mechanisms:
        for position, (name, config) in enumerate(mechanisms_of(pipeline.config, offer)):
            yield _variant(pipeline, name, position, config=config)
    else:
        yield from _RANGES[kind](pipeline)


def _variant(
    pipeline: PipelinePlan,
    name: str,
    value: float,
    *,
    config: Config | None = None,
    assumptions: Assumptions | None = None,
    series: str = "",
    note: str = "",
) -> Variant:
    return Variant(
        name=name,
        value=value,
        config=config or pipeline.config,
        assumptions=assumptions or pipeline.assumptions,
        series=series,
        note=note,
    )


def _nodes(pipeline: PipelinePlan) -> Iterator[Variant]:
    """Nodes, 32 to 512; of a small cluster as many doublings."""
    config, first = pipeline.config, NODES[0]
    least = min(first, config.cluster.nodes)
    for number in sorted({*(nodes * least // first for nodes in NODES), config.cluster.nodes}):
        changed = replace(config, cluster=replace(config.cluster, nodes=number))
        name = f"{number} nodes, {changed.world_size:,} ranks"
        yield _variant(pipeline, name, number, config=with_evaluations(changed))


def _lengths(pipeline: PipelinePlan) -> Iterator[Variant]:
    """Lengths from the configured one on, of a short one as many doublings; a step keeps its tokens."""
    config, configured = pipeline.config, pipeline.config.train.seq_len
    tokens, least = config.train.global_batch_size * configured, min(configured, LENGTHS[0])
    for length in sorted({configured, *(length * least // LENGTHS[0] for length in LENGTHS)}):
        if length < configured or tokens % length:
            continue
        changed = _of_length(config, length, tokens // length)
        name = f"{length // 1024}K tokens" if length % 1024 == 0 else f"{length:,} tokens"
        yield _variant(pipeline, name, length, config=changed)


def _of_length(config: Config, length: int, number: int) -> Config:
    """The same with so many sequences of another length; RoPE is stretched where it is too short."""
    rope = config.model.rope
    stretched = max(rope.scaling_factor, length / rope.original_max_position)
    model = replace(config.model, rope=replace(rope, scaling_factor=stretched))
    train = replace(config.train, seq_len=length, global_batch_size=number)
    return with_evaluations(replace(config, model=model, train=train))


def _shares(pipeline: PipelinePlan) -> Iterator[Variant]:
    """Shares of vision, for each place of the tower."""
    for series, (mode, schedule) in PLACES.items():
        dep = replace(pipeline.config.dep, mode=mode, schedule=schedule, split_items=False)
        config = replace(pipeline.config, dep=dep)
        for share in VISION_SHARES:
            assumptions = replace(pipeline.assumptions, vision_share=share)
            name = f"{share:.0%} {series}"
            yield _variant(pipeline, name, share, config=config, assumptions=assumptions, series=series)


def with_shared_sequences(variant: Variant) -> Iterator[Variant]:
    """The same with sequences shared by more ranks: twice as many, four times, as far as there are ranks and
    tokens."""
    config = variant.config
    sizes, tokens = config.parallelism, config.train.seq_len * config.train.micro_batch_size
    shared = 2 * sizes.cp
    while config.dp_cp % shared == 0 and tokens % shared == 0:
        changed = replace(config, parallelism=replace(sizes, cp=shared, cp_exchange=None))
        yield replace(
            variant,
            name=f"{variant.name} over {shared} ranks",
            config=with_evaluations(changed),
            note=f"parallelism.cp={shared}",
        )
        shared *= 2


def _slow_nodes(pipeline: PipelinePlan) -> Iterator[Variant]:
    for times in SLOW_NODES:
        assumptions = replace(pipeline.assumptions, slow_node=times)
        yield _variant(pipeline, f"{times:g} times", times, assumptions=assumptions)


def _networks(pipeline: PipelinePlan) -> Iterator[Variant]:
    cluster = pipeline.config.cluster
    for share in NETWORK_SHARES:
        rate = share * cluster.network_gb_per_s
        config = replace(pipeline.config, cluster=replace(cluster, network_gb_per_s=rate))
        yield _variant(pipeline, f"{rate:g} GB/s", rate, config=config)


def _imbalances(pipeline: PipelinePlan) -> Iterator[Variant]:
    for times in IMBALANCES:
        assumptions = replace(pipeline.assumptions, expert_imbalance=times)
        yield _variant(pipeline, f"{times:g} times", times, assumptions=assumptions)


def _devices(pipeline: PipelinePlan, offer: Offer) -> Iterator[Variant]:
    """Every device but the CPU; where that is what is configured, it alone."""
    cluster = pipeline.config.cluster
    is_gpu = cluster.gpu_memory_gb is not None
    found = {name: rates for name, rates in offer.devices.items() if (rates.memory_gb is not None) == is_gpu}
    for position, (name, rates) in enumerate(found.items()):
        config = replace(pipeline.config, cluster=replace(cluster, rates=rates))
        yield _variant(pipeline, name, position, config=config)


_RANGES: dict[WhatIfKind, Callable[[PipelinePlan], Iterator[Variant]]] = {
    WhatIfKind.nodes: _nodes,
    WhatIfKind.length: _lengths,
    WhatIfKind.vision: _shares,
    WhatIfKind.slow_node: _slow_nodes,
    WhatIfKind.network: _networks,
    WhatIfKind.imbalance: _imbalances,
}
