"""The stream of named tensors out of the modules of a running trainer, without a checkpoint in between.

Each rank yields a share of what it holds, so that all ranks together yield every tensor of the release once:
who has the same as others yields every n-th of it. An inference engine next to the trainer takes each rank's
tensors there; where one rank wants all, `gathered` sends them to it one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from k25_train.checkpoint.whole import HeldTensor, held_tensors
from k25_train.errors import CheckpointError
from k25_train.export.listing import ReleasedTensor
from k25_train.export.stream import TORCH_DTYPES, NamedTensor, named
from parallel.megatron.replicas import complete_parameters


@dataclass(frozen=True, slots=True)
class _Own:
    """A tensor that this rank yields."""

    number: int
    """Its place in the release."""
    held: HeldTensor
    """What has its elements."""


class LiveTensors:
    """What this rank yields of a release: views of its weights, which are valid until the next update."""

    def __init__(self, modules: Sequence[DistributedDataParallel], tensors: Sequence[ReleasedTensor]) -> None:
        """Called by every rank; gathers what the last update left stale.

        Args:
            modules: model chunks and the decoupled encoder.
            tensors: of the release, the same on all ranks.
        """
        complete_parameters(modules)
        self._tensors = tensors
        self._own: list[_Own] = []
        by_source: dict[str, list[int]] = {}
        for number, tensor in enumerate(tensors):
            by_source.setdefault(tensor.source, []).append(number)
        for module in modules:
            self._own += _shares(module, tensors, by_source)
        self._own.sort(key=lambda own: own.number)

    def __iter__(self) -> Iterator[NamedTensor]:
        """This rank's tensors, in the order of the release."""
        for own in self._own:
            tensor = self._tensors[own.number]
            first = tensor.start - own.held.start
            yield named(tensor, own.held.flat[first : first + tensor.size])

    @property
    def held(self) -> list[ReleasedTensor]:
        """What this rank yields, in the same order."""
        return [self._tensors[own.number] for own in self._own]

    def gathered(self, group: dist.ProcessGroup, destination: int) -> Iterator[NamedTensor]:
        """All tensors on one rank of the group, in the order of the release; nothing on the others.

        Every rank of the group has to exhaust it. A tensor is sent when the one before it was taken, so that
        each rank has memory for one.

        Raises `CheckpointError` on the destination if no rank has a tensor, or two have.
        """
        own = np.array([each.number for each in self._own], dtype=np.int64)
        by_rank: list[np.ndarray] | None = None
        if group.rank() == destination:
            by_rank = [own] * group.size()
        dist.gather_object(own, by_rank, group=group, group_dst=destination)
        if by_rank is None:
            for each in self:
                dist.send(each.tensor.contiguous(), group=group, group_dst=destination)
            return
        mine = iter(self)
        for tensor, owner in zip(self._tensors, _owners(by_rank, self._tensors), strict=True):
            if owner == destination:
                yield next(mine)
                continue
            received = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device=self._own_device())
            dist.recv(received, group=group, group_src=owner)
            yield NamedTensor(tensor.name, received)

    def _own_device(self) -> torch.device:
        return self._own[0].held.tensor.device if self._own else torch.device("cpu")


def _shares(
    module: DistributedDataParallel, tensors: Sequence[ReleasedTensor], by_source: dict[str, list[int]]
) -> Iterator[_Own]:
    """Of what several ranks have alike, each has every n-th tensor."""
    numbers_held = dict.fromkeys((module.dp_cp_group, module.expt_dp_group), 0)
    for held in held_tensors(module):
        group = module.expt_dp_group if held.is_expert else module.dp_cp_group
        stop = held.start + held.tensor.numel()
        for number in by_source.get(held.name, ()):
            if held.start <= tensors[number].start and tensors[number].stop <= stop:
                if numbers_held[group] % group.size() == group.rank():
                    yield _Own(number, held)
                numbers_held[group] += 1


def _owners(by_rank: Sequence[np.ndarray], tensors: Sequence[ReleasedTensor]) -> list[int]:
    """Number of each tensor -> the rank that has it."""
    owners = np.full(len(tensors), -1)
    for rank, numbers in enumerate(by_rank):
        taken = numbers[owners[numbers] >= 0]
        if len(taken):
            name = tensors[taken[0]].name
            raise CheckpointError(f"ranks {owners[taken[0]]} and {rank} both have {name}; it must be one")
        owners[numbers] = rank
    missing = np.flatnonzero(owners < 0)
    if len(missing):
        name = tensors[missing[0]].name
        raise CheckpointError(f"no rank has {name} ({len(missing)} tensors are missing)")
    return [int(owner) for owner in owners]
