"""From a model to what trains: data-parallel replicas and the optimizer of their parameters.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from typing import NamedTuple

from megatron.core.distributed import DistributedDataParallel

from k25_train.config.schema import Config
from k25_train.model.build import Model
from k25_train.model.megatron_config import TORCH_DTYPE, BackboneConfig
from k25_train.optim.build import build_optimizer, freeze, parameter_rules, updated_by_muon
from parallel.megatron.replicas import EncoderReplica, replicate, replicate_everywhere
from parallel.megatron.sharded_optimizer import separate_buffers
from parallel.megatron.skip_non_finite import SkipNonFiniteOptimizer
from parallel.topology import Topology


class Assembled(NamedTuple):
    """What trains on one rank."""

    chunks: list[DistributedDataParallel]
    """Model chunks, one per virtual stage."""
    encoders: list[EncoderReplica]
    """This rank's replica of the decoupled encoder; empty if the tower is coupled."""
    optimizer: SkipNonFiniteOptimizer
    """The optimizer of all their parameters."""


def assemble(model: Model, config: Config, backbone: BackboneConfig, topology: Topology) -> Assembled:
    """Wrap this rank's chunks for data parallelism, its encoder for all ranks, and build their optimizer.

    Raises `ConfigError` if `optim.offload` asks for what is not installed.
    """
    # 1. What is trained, and by which rule; what is frozen gets no gradient buffer.
    freeze(model.modules, config.optim)
    rules = parameter_rules(model.modules, config.optim, config.model)
    # 2. Gradient buffers: parameters of Muon and of AdamW get separate ones, each owned by one optimizer.
    with separate_buffers(updated_by_muon(rules)):
        chunks = replicate(
            model.chunks,
            backbone,
            topology,
            overlap_grad_reduce=config.parallelism.overlap_grad_reduce,
            overlap_param_gather=config.parallelism.overlap_param_gather,
        )
        encoders = [replicate_everywhere(encoder, backbone, topology) for encoder in model.encoders]
    # 3. The optimizers, sharded over the ranks that hold the same parameters.
    names, dtype = dict(model.parameter_names()), TORCH_DTYPE[config.train.dtype]
    optimizer = build_optimizer(config.optim, rules, names, chunks, encoders, dtype, topology)
    return Assembled(chunks, encoders, optimizer)
