"""What was planned, in words: sizes, layout, assumptions."""

import re
from itertools import groupby

from k25_train.plan.assumptions import AS_CONFIGURED
from k25_train.plan.context import reason_of
from k25_train.plan.pipeline import PipelinePlan
from parallel.config import DepMode
from parallel.pipeline.layout import PipelineLayout

LONG = re.compile("tttt+")
"""Layers of a chunk that are counted rather than written out."""


def title_text(pipeline: PipelinePlan) -> str:
    """Which model, on what."""
    config, cluster = pipeline.config, pipeline.config.cluster
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes:,} nodes"
    return (
        f"{config.model.name} on {config.world_size:,} x {cluster.rates.device} ({nodes}), "
        f"{config.train.seq_len:,} tokens per sequence"
    )


def layout_text(layout: PipelineLayout) -> str:
    """The layout in megatron-core's notation, what repeats written once: `Ett|(tt|)*28t|tL`, `Et*27L`.

    It is a value of `parallelism.layout`.
    """
    chunks = [
        LONG.sub(lambda match: f"t*{len(match[0])}", chunk) for chunk in layout.to_megatron().split("|")
    ]
    written = []
    for chunk, alike in groupby(chunks[:-1]):
        number = len(list(alike))
        written.append(f"({chunk}|)*{number}" if number > 2 else f"{chunk}|" * number)
    return "".join(written) + chunks[-1]


def sizes_text(pipeline: PipelinePlan) -> str:
    """Sizes of the layout, the dispatcher, and where the vision tower runs."""
    config, sizes = pipeline.config, pipeline.config.parallelism
    dep = config.dep
    vision = dep.schedule.value if dep.mode is DepMode.decoupled else dep.mode.value
    shared = f"cp {sizes.cp}, " if sizes.cp > 1 else ""
    return (
        f"pp {sizes.pp} x vpp {sizes.vpp}, ep {sizes.ep}, {shared}dp {config.dp}, "
        f"{pipeline.num_micro_batches:,} micro-batches of {config.train.micro_batch_size}, "
        f"{sizes.dispatcher.value}, vision {vision}"
    )


def shared_text(pipeline: PipelinePlan) -> list[str]:
    """How ranks exchange latents that share sequences, and why so; no line where none do."""
    reason = reason_of(pipeline.config)
    return [f"latents by {reason}"] if reason else []


def overlapped_text(pipeline: PipelinePlan) -> str:
    """What runs during computation, as the end of a sentence; empty if nothing does."""
    sizes = pipeline.config.parallelism
    what = {
        "experts": sizes.overlap_expert_comm,
        "wgrad": sizes.delay_wgrad,
        "gradients": sizes.overlap_grad_reduce,
        "weights": sizes.overlap_param_gather,
    }
    words = [word for word, is_on in what.items() if is_on]
    return f"; overlapped: {', '.join(words)}" if words else ""


def assumed_text(pipeline: PipelinePlan) -> str:
    """What the plan assumes that no configuration says."""
    assumptions = pipeline.assumptions
    imbalance, slow, tokens = (
        assumptions.expert_imbalance,
        assumptions.slow_node,
        assumptions.document_tokens,
    )
    parts = [f"{assumptions.vision_share:.0%} vision"] if pipeline.config.model.has_vision else []
    parts += [
        "experts balanced" if imbalance == 1.0 else f"experts imbalanced {imbalance:g} times",
        "no slow node" if slow == 1.0 else f"a node {slow:g} times as slow",
        "1 document per sequence" if tokens is None else f"documents of {tokens:,} tokens",
    ]
    if assumptions.code != AS_CONFIGURED.code:
        parts.append("another system's code")
    return f"assumed: {', '.join(parts)}"
