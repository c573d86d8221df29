"""Model and optimizer of one rank as a run builds them, without data."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.helpers.ranks import RankContext
from tests.helpers.runs import SHRUNK


class Built(NamedTuple):
    """What a run of these overrides trains on this rank."""

    config: Any
    topology: Any
    modules: list[Any]
    """Chunks, then the decoupled encoder."""
    optimizer: Any
    model: Any


def build(context: RankContext, arguments: Sequence[str]) -> Built:
    """Build this rank's part of `SHRUNK` with these overrides, with initial weights."""
    os.environ.update(context.environment())
    from k25_train.compose.resolve import compose
    from parallel.megatron.platform import use_platform

    config = compose([*SHRUNK, "run.dir=unused", *arguments])
    device = use_platform(config.cluster.device.value)
    from k25_train.model.build import build_model
    from k25_train.model.megatron_config import backbone_config
    from k25_train.plan.pipeline import layout_of
    from k25_train.training.assemble import assemble
    from parallel.topology import build_topology, start_process_group

    start_process_group(device, timeout_s=60.0)
    layout = layout_of(config)
    separates = config.dep.separates_gradients
    topology = build_topology(config.parallelism, layout, device, separates_gradients=separates)
    backbone = backbone_config(config.model, config.train, config.parallelism, layout)
    model = build_model(config, backbone, topology)
    model.initialize(config.train.seed, config.model.init_std)
    chunks, encoders, optimizer = assemble(model, config, backbone, topology)
    return Built(config, topology, [*chunks, *encoders], optimizer, model)
