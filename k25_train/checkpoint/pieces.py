"""What of the whole state each rank saves and loads: over all ranks, every element of every tensor once.

Of what is trained a rank has the ranges that its optimizers update: weights, float32 masters and moments, so
that nothing is gathered before it is saved. What is not trained, and all weights where nothing is, several
ranks have alike; each of them has a share of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.whole import HeldTensor, held_tensors
from k25_train.units import MIB
from parallel.reshard.replicas import Shares, share_out

OPTIMIZER_STATE = "optimizer.state"
"""Optimizer tensors are called `optimizer.state.KEY.` and the name of their parameter."""
MASTER = "param"
"""The key of the float32 master; the others are the optimizer's own, such as `exp_avg`."""
SHARE_MULTIPLE = MIB // 2
"""Elements of which shares of what is replicated are a multiple: thousands of ranks would have KB each."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a tensor that this rank writes, and reads."""

    part: Part
    """Which range of which tensor."""
    tensor: Tensor
    """Its elements [n]: a view of where training has them, on the device or in host memory."""
    is_buffer: bool = False
    """Whether passes change it, and not the optimizer."""


class Replicated(NamedTuple):
    """Tensors that all ranks of a group have alike."""

    tensors: list[HeldTensor]
    group: dist.ProcessGroup

    def shares(self) -> Shares:
        """Which rank of the group answers for which elements; `item` is the number of the tensor."""
        sizes = np.array([each.tensor.numel() for each in self.tensors], dtype=np.int64)
        return share_out(sizes, self.group.size(), multiple=SHARE_MULTIPLE)


def pieces(modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer | None) -> list[Piece]:
    """This rank's pieces; all ranks together have every element of every tensor once.

    Between an update and the next pass, weights are stale outside of these pieces, but not in them. Moments
    that do not exist before a first step are made.

    Args:
        modules: model chunks and the decoupled encoder.
        optimizer: of all that is trained; None where nothing is.
    """
    shared = [
        Piece(part_of(held, start, stop), held.flat[start:stop], is_buffer=held.parameter is None)
        for module in modules
        for each in replicated(module, trains=optimizer is not None)
        for held, start, stop in share_of(each, each.group.rank())
    ]
    return [*_sharded(modules, optimizer), *shared]


def _sharded(
    modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer | None
) -> Iterator[Piece]:
    """Weights and optimizer state of this rank's optimizer shards."""
    held = {each.parameter: each for module in modules for each in held_tensors(module)}
    for own in [] if optimizer is None else optimizer.chained_optimizers:
        for parameter, shard in own.shards().items():
            whole, start, stop = held[parameter], shard.start, shard.end
            yield Piece(part_of(whole, start, stop), shard.weights)
            for key, tensor in {MASTER: shard.master, **own.moments(shard)}.items():
                yield Piece(state_part_of(whole, start, stop, key), tensor)


def replicated(
    module: DistributedDataParallel, *, trains: bool, ep_rank: int | None = None
) -> Iterator[Replicated]:
    """What of a module no optimizer shards, by the ranks that have it alike: the same on all of these.

    Args:
        trains: whether there is an optimizer of all that has a gradient buffer.
        ep_rank: the expert-parallel rank to answer for; by default this rank's.
    """
    sharded = set(trained_parameters(module)) if trains else set[nn.Parameter]()
    held = [each for each in held_tensors(module, ep_rank) if each.parameter not in sharded]
    experts = [each for each in held if each.is_expert]
    others = [each for each in held if not each.is_expert]
    for tensors, group in ((others, module.dp_cp_group), (experts, module.expt_dp_group)):
        if tensors:
            yield Replicated(tensors, group)


def share_of(each: Replicated, rank: int) -> Iterator[tuple[HeldTensor, int, int]]:
    """What a rank of the group answers for: a tensor, its first element, and the one after the last."""
    own = each.shares().of(rank)
    for item, start, stop in zip(own.item, own.start, own.stop, strict=True):
        yield each.tensors[item], int(start), int(stop)


def trained_parameters(module: DistributedDataParallel) -> Iterator[nn.Parameter]:
    """All parameters that have gradients."""
    for buffer in (*module.buffers, *module.expert_parallel_buffers):
        yield from buffer.params


def part_of(held: HeldTensor, start: int, stop: int) -> Part:
    """Elements `start` to `stop` of a module's tensor, as a part of the whole one."""
    return Part(held.name, held.tensor.dtype, held.shape, held.start + start, held.start + stop)


def state_part_of(held: HeldTensor, start: int, stop: int, key: str) -> Part:
    """What an optimizer keeps about the same elements."""
    name = f"{OPTIMIZER_STATE}.{key}.{held.name}"
    return Part(name, torch.float32, held.shape, held.start + start, held.start + stop)
