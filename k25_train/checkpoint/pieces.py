"""What of the whole state each rank saves and loads: over all ranks, every element of every tensor once.

Of what is trained a rank has the ranges that its optimizers update: weights, float32 masters and moments, so
that nothing is gathered before it is saved. What is not trained, and all weights where nothing is, several
ranks have alike; each of them has a share of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.whole import HeldTensor, held_tensors
from k25_train.units import MIB

OPTIMIZER_STATE = "optimizer.state"
"""Optimizer tensors are called `optimizer.state.KEY.` and the name of their parameter."""
MASTER = "param"
"""The key of the float32 master; the others are the optimizer's own, such as `exp_avg`."""
LEAST_SHARE = MIB // 2
"""Elements in a share of what is replicated, so that thousands of ranks do not have some KB each."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a tensor that this rank writes, and reads."""

    part: Part
    """Which range of which tensor."""
    tensor: Tensor
    """Its elements [n]: a view of where training has them, on the device or in host memory."""


class Replicated(NamedTuple):
    """Tensors that all ranks of a group have alike."""

    tensors: list[HeldTensor]
    group: dist.ProcessGroup

    def share(self, rank: int) -> Iterator[tuple[HeldTensor, int, int]]:
        """What a rank of the group answers for: tensor, first and last element in it."""
        sizes = [each.tensor.numel() for each in self.tensors]
        for number, start, stop in share(sizes, rank, self.group.size(), LEAST_SHARE):
            yield self.tensors[number], start, stop


def pieces(modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer | None) -> list[Piece]:
    """This rank's pieces; all ranks together have every element of every tensor once.

    Between an update and the next pass, weights are stale outside of these pieces, but not in them. Moments
    that do not exist before a first step are made.

    Args:
        modules: model chunks and the decoupled encoder.
        optimizer: of all that is trained; None where nothing is.
    """
    shared = [
        Piece(part_of(held, start, stop), held.flat[start:stop])
        for each in replicated(modules, trains=optimizer is not None)
        for held, start, stop in each.share(each.group.rank())
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
            if start < stop:
                yield Piece(part_of(whole, start, stop), shard.weights)
                for key, tensor in {MASTER: shard.master, **own.moments(shard)}.items():
                    yield Piece(state_part_of(whole, start, stop, key), tensor)


def replicated(modules: Sequence[DistributedDataParallel], *, trains: bool) -> Iterator[Replicated]:
    """What no optimizer shards, by the ranks that have it alike: the same on all of these.

    Args:
        trains: whether there is an optimizer of all that has a gradient buffer.
    """
    for module in modules:
        sharded = set(trained_parameters(module)) if trains else set[nn.Parameter]()
        held = [each for each in held_tensors(module) if each.parameter not in sharded]
        experts = [each for each in held if each.is_expert]
        others = [each for each in held if not each.is_expert]
        for tensors, group in ((others, module.dp_group), (experts, module.expt_dp_group)):
            if tensors:
                yield Replicated(tensors, group)


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


def share(sizes: Sequence[int], index: int, num_shares: int, least: int) -> Iterator[tuple[int, int, int]]:
    """One of even shares of several tensors, as if these were one after another.

    Args:
        sizes: number of elements of each tensor.
        index: number of the share.
        num_shares: how many there are; the last ones may be empty.
        least: elements that all shares but the last have at least.

    Yields the number of a tensor, and the first element in it and the one after the last.
    """
    size = max(-(-sum(sizes) // num_shares), least)
    first, last, offset = index * size, (index + 1) * size, 0
    for number, length in enumerate(sizes):
        start, stop = max(first - offset, 0), min(last - offset, length)
        if start < stop:
            yield number, start, stop
        offset += length
