"""One rank of the job as it is after its first step: real modules, buffers and optimizer, without data.

Import this module only after `use_platform("meta")`: it imports megatron-core.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from torch import Tensor

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.dryrun.group_members import KINDS
from k25_train.model.build import build_model
from k25_train.model.megatron_config import backbone_config
from k25_train.training.assemble import assemble
from parallel.fake_group import GroupsOfWorld, fake_rank
from parallel.megatron.replicas import EncoderReplica
from parallel.pipeline.layout import PipelineLayout
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.topology import Topology, build_topology

META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """What a rank keeps from step to step; activations come on top."""

    weights: int
    """Parameters, with the padding of the buffers they lie in, and the modules' buffers."""
    gradients: int
    """Gradient buffers, padding included."""
    optimizer: int
    """Float32 masters and moments of the rank's shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRank:
    """What one rank has built. Its process groups are gone; their members are in `groups`."""

    topology: Topology
    groups: dict[str, tuple[int, ...]]
    """Name of a group in megatron-core's collection -> global ranks."""
    groups_of_world: GroupsOfWorld
    chunks: list[DistributedDataParallel]
    encoders: Sequence[EncoderReplica]
    """Its replica of the decoupled encoder; empty if the tower is coupled."""
    optimizer: MegatronOptimizer
    micro_batch_group_size: int
    """Micro-batches that the interleaved schedule runs through one chunk before the next one's turn."""
    num_warmup_passes: int
    """Forward passes of a chunk that the schedule runs before the first backward pass."""

    @property
    def modules(self) -> list[DistributedDataParallel]:
        """All that holds weights."""
        return [*self.chunks, *self.encoders]


def build_rank(config: Config, layout: PipelineLayout, rank: int) -> BuiltRank:
    """Build `rank` through the code that a run goes through, with megatron-core's own layers.

    Transformer Engine's layers, whose weights have the same names and shapes, need a GPU. Optimizer state is
    built on the device also where the run keeps it in host memory: the tensors are the same.
    """
    train = replace(config.train, transformer_engine=False)
    optim = replace(config.optim, offload=OptimizerOffload.none)
    config = replace(config, train=train, optim=optim)
    with fake_rank(rank, config.world_size) as groups_of_world:
        separates = config.dep.separates_gradients
        topology = build_topology(config.parallelism, layout, META, separates_gradients=separates)
        backbone = backbone_config(config.model, train, config.parallelism, layout)
        with META:
            model = build_model(config, backbone, topology)
        built = assemble(model, config, backbone, topology)
        make_state(built.optimizer)
        group_size = config.num_micro_batches
        if topology.vpp_size > 1:
            group_size = micro_batch_group_size(config.num_micro_batches, topology.pp_size)
        _, _, num_warmup_passes, _ = get_pp_rank_microbatches(
            config.num_micro_batches,
            topology.vpp_size,
            group_size,
            overlap_moe_expert_parallel_comm=backbone.overlap_moe_expert_parallel_comm,
        )
        return BuiltRank(
            topology=topology,
            groups={
                kind: tuple(dist.get_process_group_ranks(getattr(topology.groups, kind))) for kind in KINDS
            },
            groups_of_world=groups_of_world,
            chunks=built.chunks,
            encoders=built.encoders,
            optimizer=built.optimizer,
            micro_batch_group_size=group_size,
            num_warmup_passes=num_warmup_passes,
        )


def optimizer_parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """megatron-core's optimizers, one for each update rule of shared and of expert parameters."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part


def inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """torch's optimizers behind them."""
    return (part.optimizer for part in optimizer_parts(optimizer))


def make_state(optimizer: MegatronOptimizer) -> None:
    """Let the optimizer make its state, by a step without numbers."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            # The fused kernel is not written for meta tensors; the state is the same.
            group["fused"] = False
            for master in group["params"]:
                master.grad = torch.zeros_like(master)
        inner.step()
        inner.zero_grad(set_to_none=True)


def masters_and_state(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each shard that the optimizer updates, and the tensors that it keeps about it."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for master in group["params"]:
                kept: dict[str, Any] = inner.state[master]
                yield master, [value for value in kept.values() if torch.is_tensor(value)]


def gradient_buffers(chunk: DistributedDataParallel) -> list[tuple[Any, bool]]:
    """megatron-core's buffers of a chunk, and whether they are for routed experts."""
    shared = [(buffer, False) for buffer in chunk.buffers]
    return shared + [(buffer, True) for buffer in chunk.expert_parallel_buffers]


def storage_bytes(tensors: Iterable[Tensor], excluding: Iterable[Tensor] = ()) -> int:
    """Bytes of the memory behind `tensors`, views counted once, without memory that `excluding` shares."""
    known = {tensor.untyped_storage()._cdata for tensor in excluding}
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


def bytes_of(modules: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> RankBytes:
    """What the tensors of a rank take, real or meta."""
    weights = [tensor for each in modules for tensor in (*each.module.parameters(), *each.module.buffers())]
    gradients = [buffer.grad_data for each in modules for buffer, _ in gradient_buffers(each)]
    state = [tensor for master, kept in masters_and_state(optimizer) for tensor in (master, *kept)]
    return RankBytes(
        weights=storage_bytes(weights),
        gradients=storage_bytes(gradients),
        optimizer=storage_bytes(state, excluding=weights),
    )
