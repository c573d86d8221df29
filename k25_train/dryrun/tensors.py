"""Every tensor that the ranks hold, against the configuration's own list of them.

Tensors are compared under the released checkpoint's names, which the configuration's list uses. A stage's
ranks differ in the experts they hold; those of the ranks that were not built have the built rank's shapes
and their own numbers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig
from k25_train.config.schema import Config
from k25_train.dryrun.rank import BuiltRank
from k25_train.export.released import shown, to_hf
from k25_train.model.build import WHOLE, chunk_place
from k25_train.model.weights import global_state
from k25_train.parameters.released import TensorSpec, count_parameters
from k25_train.parameters.table import EMBEDDING, EXPERTS, OUTPUT_HEAD, VISION_MODULES
from k25_train.parameters.update_rules import is_trained
from parallel.config import Problem

PARTS = ("dense", "experts", "embedding, head", "vision")
"""Parts of the model that parameters are reported by, in order."""

ENCODER = "encoder"
"""Holder of the tensors of a decoupled encoder, of which every rank has a replica."""

LAYOUT = "correct the layout: parallelism.layout, or parallel/pipeline/layout.py"
NAMES = "bring k25_train/model and k25_train/parameters/table.py together"


class Held(NamedTuple):
    """One tensor of the checkpoint, on the ranks that hold it."""

    name: str
    """Name in the released checkpoint."""
    shape: tuple[int, ...]
    """Shape in the released checkpoint."""
    dtype: torch.dtype
    """Format on the rank."""
    holder: str
    """Stage, chunk and expert-parallel rank."""


def part_of(module: str) -> str:
    """The part that a module of the parameter count is reported in."""
    if module == EXPERTS:
        return "experts"
    if module in VISION_MODULES:
        return "vision"
    return "embedding, head" if module in (EMBEDDING, OUTPUT_HEAD) else "dense"


def held_by(built: BuiltRank, config: Config) -> Iterator[Held]:
    """What the ranks of a stage hold, replicas left out: a decoupled encoder is the first stage's.

    Raises `CheckpointError` if the model has a tensor that the checkpoint has no name for.
    """
    topology = built.topology
    for vp_stage, chunk in enumerate(built.chunks):
        for ep_rank in range(topology.ep_size):
            there = chunk_place(config, replace(topology, ep_rank=ep_rank), vp_stage)
            state = global_state(chunk.module, there)
            is_built = ep_rank == topology.ep_rank
            own = {name: tensor for name, tensor in state if is_built or ".mlp.experts." in name}
            holder = f"stage {topology.pp_rank}, chunk {vp_stage}, expert rank {ep_rank}"
            yield from _in_checkpoint_names(own, holder)
    for encoder in built.encoders if topology.pp_rank == 0 else ():
        yield from _in_checkpoint_names(dict(global_state(encoder.module, WHOLE)), ENCODER)


def _in_checkpoint_names(state: Mapping[str, Tensor], holder: str) -> Iterator[Held]:
    for name, tensor in to_hf(state).items():
        yield Held(name, tuple(tensor.shape), tensor.dtype, holder)


def count_by_part(held: Sequence[Held], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Parameters by part, tensors that the configuration does not list left out."""
    counts = dict.fromkeys(PARTS, 0)
    for tensor in held:
        spec = specs.get(tensor.name)
        if spec is not None and not spec.is_buffer:
            counts[part_of(spec.module)] += torch.Size(tensor.shape).numel()
    return counts


def count_updated(held: Sequence[Held], specs: Mapping[str, TensorSpec], optim: OptimConfig) -> int:
    """Parameters that the ranks of a stage update among themselves: neither frozen nor the encoder's."""
    own = [tensor for tensor in held if tensor.holder != ENCODER and is_trained(tensor.name, optim)]
    return sum(count_by_part(own, specs).values())


def check_layers(ranks: Sequence[BuiltRank], num_layers: int) -> list[Problem]:
    """Decoder layers that no chunk or several chunks have, and chunks that built others than they should."""
    found = []
    times: Counter[int] = Counter()
    for built in ranks:
        topology = built.topology
        for vp_stage, chunk in enumerate(built.chunks):
            layers = topology.layout.layer_ids(topology.pp_rank, vp_stage)
            times.update(layers)
            num_built = len(chunk.module.language_model.decoder.layers)
            if num_built != len(layers):
                where = f"layers built in stage {topology.pp_rank}, chunk {vp_stage}"
                rule = f"must be the {len(layers)} that the layout gives it"
                found.append(Problem(where, num_built, rule, LAYOUT))
    wrong = [layer for layer in {*times, *range(num_layers)} if times[layer] != (layer in range(num_layers))]
    if wrong:
        counts = [times[layer] for layer in wrong]
        rule = f"must be in one chunk each, and be 0 … {num_layers - 1}; are in {counts}"
        found.append(Problem("layers", wrong, rule, LAYOUT))
    return found


def check_tensors(held: Sequence[Held], specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> list[Problem]:
    """Tensors that are missing, held by several, unlisted, or of another shape or dtype than listed."""
    holders: dict[str, list[str]] = {}
    for tensor in held:
        holders.setdefault(tensor.name, []).append(tensor.holder)
    twice = [f"{name} ({' and '.join(where)})" for name, where in holders.items() if len(where) > 1]
    misshapen = [
        f"{tensor.name} {tensor.shape} for {specs[tensor.name].shape}"
        for tensor in held
        if tensor.name in specs and tensor.shape != specs[tensor.name].shape
    ]
    mistyped = [
        f"{tensor.name} {tensor.dtype}"
        for tensor in held
        if tensor.name in specs and not specs[tensor.name].is_buffer and tensor.dtype != dtype
    ]
    faults = {
        "tensors that no rank holds": ([name for name in specs if name not in holders], LAYOUT),
        "tensors that several stages or expert ranks hold": (twice, LAYOUT),
        "tensors that the configuration does not count": ([n for n in holders if n not in specs], NAMES),
        "tensors of another shape": (misshapen, NAMES),
        "tensors of another format": (mistyped, f"{NAMES}; {dtype} is train.dtype"),
    }
    return [
        Problem(what, shown(names), f"must not be: there are {len(names)}", remedy)
        for what, (names, remedy) in faults.items()
        if names
    ]


def check_total(parameters: Sequence[Mapping[str, int]], model: ModelConfig) -> list[Problem]:
    """Parts whose parameters, summed over the stages, are not what the configuration counts."""
    expected = dict.fromkeys(PARTS, 0)
    for module in count_parameters(model).modules:
        expected[part_of(module.module)] += module.total
    found = []
    for part in PARTS:
        total = sum(stage[part] for stage in parameters)
        if total != expected[part]:
            rule = f"must be {expected[part]:,}, as `python -m k25_train.plan` counts"
            found.append(Problem(f"parameters: {part}", f"{total:,}", rule, NAMES))
    return found
