"""Gradient buffers, their buckets, and which part of them each data-parallel rank updates (ZeRO-1).

The parts come from megatron-core's own function, asked once for every rank of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from k25_train.dryrun.rank import (
    BuiltRank,
    bytes_of,
    gradient_buffers,
    masters_and_state,
    optimizer_parts,
    storage_bytes,
)
from parallel.config import Problem
from parallel.megatron.sharded_optimizer import shard_ranges

CODE = "a fault of the code: compare megatron-core's distrib_optimizer.py with what this check expects"


@dataclass(slots=True)
class Owned:
    """What one rank updates."""

    elements: int = 0
    tensors: int = 0
    state_bytes: int = 0
    """Masters and optimizer state."""

    def __add__(self, other: Owned) -> Owned:
        return Owned(
            self.elements + other.elements,
            self.tensors + other.tensors,
            self.state_bytes + other.state_bytes,
        )


@dataclass(frozen=True, slots=True)
class StateCost:
    """Bytes of master and optimizer state of a shard, as the built rank's tensors have them."""

    per_element: int
    per_tensor: int


def owned_by_rank(
    built: BuiltRank, costs: Mapping[nn.Parameter, StateCost]
) -> tuple[list[Owned], list[Problem]]:
    """What every rank of a stage updates of its chunks, by data-parallel rank, and parameters that are not
    updated exactly once."""
    topology = built.topology
    owned = [Owned() for _ in range(topology.stage_size)]
    problems = []
    for vp_stage, chunk in enumerate(built.chunks):
        where = f"pipeline stage {topology.pp_rank}, chunk {vp_stage}"
        for buffer, is_expert in gradient_buffers(chunk):
            # Experts are shared out over every ep-th rank of the stage, and so is each one's state.
            ranks_per_shard = topology.ep_size if is_expert else 1
            names = {parameter: name for name, parameter in chunk.module.named_parameters()}
            problems += _share_out(buffer, ranks_per_shard, owned, costs, names, where)
    return owned, problems


def encoder_owned_by_rank(
    built: BuiltRank, costs: Mapping[nn.Parameter, StateCost]
) -> tuple[list[Owned], list[Problem]]:
    """What every rank of the job updates of the encoder, and its parameters not updated exactly once."""
    owned = [Owned() for _ in range(built.topology.world_size)]
    problems = []
    for encoder in built.encoders:
        names = {parameter: name for name, parameter in encoder.module.named_parameters()}
        for buffer, _ in gradient_buffers(encoder):
            problems += _share_out(buffer, 1, owned, costs, names, "encoder")
    return owned, problems


def _share_out(
    buffer: Any,
    ranks_per_shard: int,
    owned: list[Owned],
    costs: Mapping[nn.Parameter, StateCost],
    names: Mapping[nn.Parameter, str],
    where: str,
) -> list[Problem]:
    """Add to `owned` what each rank updates of a buffer; its parameters that are not updated exactly once."""
    num_shards = len(owned) // ranks_per_shard
    parts: dict[nn.Parameter, list[tuple[int, int]]] = {parameter: [] for parameter in buffer.params}
    for shard in range(num_shards):
        for parameter, start, end in shard_ranges(buffer, shard, num_shards):
            parts[parameter].append((start, end))
            cost = costs[parameter]
            for rank in range(shard * ranks_per_shard, (shard + 1) * ranks_per_shard):
                owned[rank].elements += end - start
                owned[rank].tensors += 1
                owned[rank].state_bytes += cost.per_element * (end - start) + cost.per_tensor
    return [
        Problem(
            f"{where}: {names[parameter]}",
            f"updated in ranges {ranges[:4]}",
            f"must have each of its {parameter.numel()} elements updated by one rank",
            CODE,
        )
        for parameter, ranges in parts.items()
        if not tiles(ranges, parameter.numel())
    ]


def tiles(ranges: list[tuple[int, int]], length: int) -> bool:
    """Whether the ranges cover 0 … length once, without gap or overlap."""
    position = 0
    for start, end in sorted(ranges):
        if start != position:
            return False
        position = end
    return position == length


def state_costs(built: BuiltRank) -> tuple[dict[nn.Parameter, StateCost], list[Problem]]:
    """What a shard of each parameter costs in masters and optimizer state.

    Parameters of one update rule have one optimizer, and cost the same. The built rank is the first of its
    data-parallel groups, and the first shard of a buffer is never empty, so that it has seen every rule. Of
    the encoder that holds for rank 0 alone.
    """
    weights = [weight for each in built.modules for weight in each.module.parameters()]
    of_parameter: dict[nn.Parameter, StateCost] = {}
    problems = []
    for part in optimizer_parts(built.optimizer):
        costs: set[StateCost] = set()
        for master, kept in masters_and_state(part):
            per_element = 0 if storage_bytes([master], excluding=weights) == 0 else master.element_size()
            per_element += sum(tensor.element_size() for tensor in kept if tensor.shape == master.shape)
            per_tensor = sum(tensor.nbytes for tensor in kept if tensor.shape != master.shape)
            costs.add(StateCost(per_element, per_tensor))
        # A stage without layers between others has no parameters at all.
        most = max(costs, key=lambda cost: cost.per_element, default=StateCost(0, 0))
        of_parameter |= {parameter: most for buffer in part.buffers for parameter in buffer.params}
        if len(costs) > 1:
            where = f"optimizer state of rank {built.topology.rank}"
            rule = "must cost the same for every parameter of one update rule"
            remedy = "build all parameters in train.dtype, or count state by parameter in "
            remedy += "k25_train/dryrun/optimizer_shards.py"
            problems.append(Problem(where, sorted(map(str, costs)), rule, remedy))
    return of_parameter, problems


def check_built_state(built: BuiltRank, expected: Owned) -> list[Problem]:
    """Whether the built rank's optimizer is what the same arithmetic gives that counts the other ranks'."""
    topology = built.topology
    masters = [master for master, _ in masters_and_state(built.optimizer)]
    real = Owned(
        elements=sum(master.numel() for master in masters),
        tensors=len(masters),
        state_bytes=bytes_of(built.modules, built.optimizer).optimizer,
    )
    if real == expected:
        return []
    rule = f"must be {expected}, as its shard ranges say"
    return [Problem(f"optimizer of rank {topology.rank}", real, rule, CODE)]


def check_buffers(built: BuiltRank) -> list[Problem]:
    """Buckets that leave gaps, cannot be cut evenly, or do not hold each parameter once, in its own place."""
    found = []
    for number, chunk in enumerate(built.modules):
        what = "encoder" if chunk in built.encoders else f"chunk {number}"
        where = f"pipeline stage {built.topology.pp_rank}, {what}"
        buffers = [buffer for buffer, _ in gradient_buffers(chunk)]
        held = [parameter for buffer in buffers for parameter in buffer.param_index_map]
        trained = [parameter for parameter in chunk.module.parameters() if parameter.requires_grad]
        if len(held) != len(trained) or set(held) != set(trained):
            rule = f"must be the {len(trained)} trained parameters, each once"
            found.append(Problem(f"{where}: parameters with a gradient", len(held), rule, CODE))
        for index, buffer in enumerate(buffers):
            found += _buffer_problems(buffer, f"{where}, buffer {index}")
    return found


def _buffer_problems(buffer: Any, where: str) -> list[Problem]:
    found = []
    shards = buffer.data_parallel_group.size()
    if not tiles(list(buffer.bucket_indices), buffer.grad_data.numel()):
        rule = f"must follow one another without gaps up to {buffer.grad_data.numel()}"
        found.append(Problem(f"{where}: buckets", buffer.bucket_indices[:4], rule, CODE))
    uneven = [end - start for start, end in buffer.bucket_indices if (end - start) % shards]
    if uneven:
        rule = f"must be multiples of the {shards} ranks that share them"
        found.append(Problem(f"{where}: bucket sizes", uneven[:4], rule, CODE))
    position = 0
    for parameter, (start, end, bucket) in sorted(buffer.param_index_map.items(), key=lambda item: item[1]):
        low, high = buffer.bucket_indices[bucket]
        fits = low <= start and end <= high and position <= start
        if not fits or end - start != parameter.numel() or parameter.main_grad.shape != parameter.shape:
            rule = (
                f"must lie in its bucket {low}-{high}, behind {position}, {parameter.numel()} elements long"
            )
            found.append(
                Problem(f"{where}: parameter of shape {tuple(parameter.shape)}", (start, end), rule, CODE)
            )
        position = end
    return found
