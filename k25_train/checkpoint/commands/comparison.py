"""Two checkpoints compared: tensor by tensor, and what they say of themselves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k25_train.checkpoint import folders
from k25_train.checkpoint.commands.facts import Facts
from k25_train.checkpoint.commands.groups import State, state_of
from k25_train.checkpoint.commands.progress import Advance
from k25_train.checkpoint.commands.statistics import Difference, difference_of
from k25_train.checkpoint.commands.streaming import Job, in_threads, jobs, read
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.files.parts import TensorInfo
from k25_train.checkpoint.files.stored import StoredCheckpoint, Wanted
from k25_train.checkpoint.manifest import Kind
from k25_train.config.leaves import leaves


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of one checkpoint or of both."""

    name: str
    one: TensorInfo | None
    other: TensorInfo | None
    difference: Difference | None = None
    """None where it was not compared: it is missing, or its shapes differ."""

    @property
    def relative(self) -> float:
        """How far apart both are; infinite where they cannot be compared."""
        return math.inf if self.difference is None else self.difference.relative

    @property
    def has_two_dtypes(self) -> bool:
        """Whether both are there, and of different dtypes."""
        return self.one is not None and self.other is not None and self.one.dtype != self.other.dtype

    def differs(self, tolerance: float) -> bool:
        """Whether it is not the same in both, up to a relative difference."""
        if self.difference is None:
            return True
        if tolerance:
            return self.relative > tolerance
        return not self.difference.is_equal or self.has_two_dtypes

    @property
    def what(self) -> str:
        """In words."""
        if self.other is None:
            return "only in the first"
        if self.one is None:
            return "only in the second"
        if self.difference is None:
            return f"shapes {list(self.one.shape)} and {list(self.other.shape)}"
        dtypes = f", {_dtype(self.one)} and {_dtype(self.other)}" if self.has_two_dtypes else ""
        if self.difference.is_equal:
            return f"equal{dtypes}"
        return f"{self.difference.num_unequal:,} of {self.difference.num_elements:,} elements{dtypes}"

    def as_json(self) -> dict[str, Any]:
        """Under the names of `--json`; null for what is not known or not finite."""
        values: dict[str, Any] = {"name": self.name, "what": self.what}
        for key, info in (("first", self.one), ("second", self.other)):
            values[key] = None if info is None else {"dtype": _dtype(info), "shape": list(info.shape)}
        if (found := self.difference) is not None:
            values |= {
                "equal": found.is_equal,
                "num_unequal": found.num_unequal,
                "max_abs": _finite(found.max_abs),
                "relative": _finite(found.relative),
                "cosine": found.cosine,
            }
        return values


def pairs_of(one: StoredCheckpoint, other: StoredCheckpoint) -> tuple[list[Pair], str]:
    """All tensors of both by name, not compared yet, and what to tell of the choice.

    Of an import and a run the weights alone are compared: an import has nothing else.
    """
    kinds = {one.manifest.kind, other.manifest.kind}
    weights_only = kinds == {Kind.RUN, Kind.WEIGHTS}
    names = [
        name
        for name in sorted({*one.tensors, *other.tensors})
        if not weights_only or state_of(name) is State.weight
    ]
    note = (
        "one of both is an import: their weights are compared, not the optimizer's state"
        if weights_only
        else ""
    )
    return [Pair(name, one.tensors.get(name), other.tensors.get(name)) for name in names], note


def compare(
    one: StoredCheckpoint,
    other: StoredCheckpoint,
    pairs: Sequence[Pair],
    num_threads: int,
    advance: Advance,
) -> list[Pair]:
    """The pairs with their differences, those that differ most first.

    Raises `DamagedCheckpointError` for what is not as it was written.
    """
    found = {
        pair.name: Difference()
        for pair in pairs
        if pair.one is not None and pair.other is not None and pair.one.shape == pair.other.shape
    }

    def look(job: Job) -> list[tuple[str, Difference]]:
        both = zip(job.names, read(one, job), _same_of(other, job), strict=True)
        return [(name, difference_of(mine, its)) for name, mine, its in both]

    for _, pieces in in_threads(look, jobs(one.parts, found), num_threads):
        for name, piece in pieces:
            found[name] += piece
            advance(piece.num_elements * one.tensors[name].dtype.itemsize)
    compared = [Pair(each.name, each.one, each.other, found.get(each.name)) for each in pairs]
    return sorted(compared, key=lambda each: (-each.relative, each.name))


def _same_of(other: StoredCheckpoint, job: Job) -> list[Tensor]:
    """The same elements of the other checkpoint, wherever its layout has put them."""
    starts, stops = job.ranges.start.tolist(), job.ranges.stop.tolist()
    wanted = [Wanted(*each) for each in zip(job.names, starts, stops, strict=True)]
    found = [torch.empty(each.stop - each.start, dtype=other.tensors[each.name].dtype) for each in wanted]
    other.read_into(wanted, found)
    return found


@dataclass(frozen=True, slots=True)
class Values:
    """Something that both checkpoints say of themselves, in different words."""

    name: str
    one: Any
    other: Any


def facts_that_differ(one: Facts, other: Facts) -> list[Values]:
    """Format, kind, step, soundness, layout, and facts of the data."""
    first, second = _flat(one), _flat(other)
    return _differing(first, second)


def config_that_differs(one: StoredCheckpoint, other: StoredCheckpoint) -> list[Values]:
    """Keys of the configuration, brought up to today's version; none if one of both has no configuration."""
    files = one.manifest.files.keys() & other.manifest.files.keys()
    if folders.CONFIG not in files:
        return []
    first, second = (dict(leaves(saved_config(each.folder / folders.CONFIG))) for each in (one, other))
    return _differing(first, second)


def _flat(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    values = {"format": manifest.version, "kind": str(manifest.kind), "step": manifest.step}
    values |= {"updates": facts.num_updates, "why unsound": manifest.why_unsound}
    values |= {f"layout.{name}": value for name, value in facts.layout.items()}
    return values | dict(manifest.facts)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Values]:
    names = [*one, *(name for name in other if name not in one)]
    return [
        Values(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
    ]


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
