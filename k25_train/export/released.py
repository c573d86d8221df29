"""Names and layouts: the released Hugging Face checkpoint's against ours, in both directions.

The table of parameters (`k25_train/parameters/table.py`) says which tensors of the checkpoint make one of
ours, and how; here are the tensor operations. Values and dtypes are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k25_train.errors import CheckpointError
from k25_train.parameters import table
from k25_train.parameters.entry import Conversion, ParameterEntry, fill, numbers_in, pattern_of

MAX_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Converter:
    """Tensor operations of one `Conversion`; `join` and `split` are each other's inverse."""

    join: Callable[[list[Tensor]], Tensor]
    """The checkpoint's tensors, in the table's order -> ours."""
    split: Callable[[Tensor, int], list[Tensor]]
    """Ours, and the number of the checkpoint's tensors in it -> these, as views."""


def _to_convolution(matrix: Tensor, _num_parts: int) -> list[Tensor]:
    edge = math.isqrt(matrix.shape[1] // 3)
    return [matrix.unflatten(1, (3, edge, edge))]


CONVERTERS = {
    Conversion.same: Converter(lambda parts: parts[0], lambda tensor, _: [tensor]),
    Conversion.join_rows: Converter(torch.cat, lambda tensor, num_parts: list(tensor.chunk(num_parts))),
    Conversion.flatten: Converter(lambda parts: parts[0].flatten(1), _to_convolution),
}


def to_ours(hf_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the checkpoint's names (unpacked weights) in ours; any subset of the model may be
    given.

    Raises:
        CheckpointError: names that the model does not have, or a gate without its up projection.
    """
    found = entries_of(hf_state, table.TABLE.by_released_name)
    targets = {fill(entry.name, *numbers): (entry, numbers) for entry, numbers in found}
    sources = {
        ours: [fill(name, *numbers) for name in entry.released] for ours, (entry, numbers) in targets.items()
    }
    missing = [name for parts in sources.values() for name in parts if name not in hf_state]
    if missing:
        raise CheckpointError(f"missing tensors: {shown(missing)}; the other half of the pair is there")
    return {
        ours: CONVERTERS[entry.conversion].join([hf_state[name] for name in sources[ours]])
        for ours, (entry, _) in targets.items()
    }


def to_hf(our_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`; split tensors are views of the given ones.

    Raises:
        CheckpointError: names that the model does not have.
    """
    hf_state: dict[str, Tensor] = {}
    found = entries_of(our_state, table.TABLE.by_name)
    for tensor, (entry, numbers) in zip(our_state.values(), found, strict=True):
        parts = CONVERTERS[entry.conversion].split(tensor, len(entry.released))
        names = [fill(name, *numbers) for name in entry.released]
        hf_state |= dict(zip(names, parts, strict=True))
    return hf_state


def entries_of(
    state: Mapping[str, Tensor], entries: Mapping[str, ParameterEntry]
) -> list[tuple[ParameterEntry, list[str]]]:
    """The entry of every name and the numbers in it; raises CheckpointError naming all that have none."""
    unexpected = [name for name in state if pattern_of(name) not in entries]
    if unexpected:
        raise CheckpointError(f"unexpected tensors: {shown(unexpected)}; the model has no such parameters")
    return [(entries[pattern_of(name)], numbers_in(name)) for name in state]


def shown(names: list[str]) -> str:
    """The first few names, and how many there are."""
    rest = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
