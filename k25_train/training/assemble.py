"""From model chunks to what trains: data-parallel replicas and the optimizer of their parameters.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel

from k25_train.config.schema import Config
from k25_train.model.build import chunk_place
from k25_train.model.megatron_config import TORCH_DTYPE, BackboneConfig
from k25_train.optim.build import build_optimizer, freeze, parameter_rules, updated_by_muon
from parallel.megatron.replicas import EncoderReplica, replicate, replicate_everywhere
from parallel.megatron.sharded_optimizer import buffers_apart
from parallel.megatron.skip_non_finite import SkipNonFiniteOptimizer
from parallel.topology import Topology


class Assembled(NamedTuple):
    """What trains on one rank."""

    chunks: list[DistributedDataParallel]
    """Model chunks, one per virtual stage."""
    encoder: EncoderReplica | None
    """This rank's replica of the decoupled encoder; None if the tower is coupled."""
    optimizer: SkipNonFiniteOptimizer
    """Of all of them."""


def assemble(
    models: Sequence[torch.nn.Module],
    encoder: torch.nn.Module | None,
    config: Config,
    backbone: BackboneConfig,
    topology: Topology,
) -> Assembled:
    """Wrap this rank's chunks for data parallelism, its encoder for all ranks, and build their optimizer.

    Raises `ConfigError` if `optim.offload` asks for what is not installed.
    """
    modules = [*models, *([encoder] if encoder else [])]
    freeze(modules, config.optim)
    rules = parameter_rules(modules, config.optim, config.model)
    with buffers_apart(updated_by_muon(rules)):
        chunks = replicate(
            models,
            backbone,
            topology,
            overlap_grad_reduce=config.parallelism.overlap_grad_reduce,
            overlap_param_gather=config.parallelism.overlap_param_gather,
        )
        replica = None if encoder is None else replicate_everywhere(encoder, backbone, topology)
    names = {
        parameter: chunk_place(config, topology, vp_stage).global_name(name)
        for vp_stage, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }
    if encoder is not None:
        names |= {parameter: name for name, parameter in encoder.named_parameters()}
    dtype = TORCH_DTYPE[config.train.dtype]
    optimizer = build_optimizer(config.optim, rules, names, chunks, replica, dtype, topology)
    return Assembled(chunks, replica, optimizer)
