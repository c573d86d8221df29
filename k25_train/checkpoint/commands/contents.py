"""What a checkpoint holds, summed up by parts of the model and by layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce

from k25_train.checkpoint.commands.groups import (
    PARTS,
    State,
    by_pattern,
    common_name,
    part_of,
    place_of,
    state_of,
)
from k25_train.checkpoint.commands.statistics import Statistics
from k25_train.checkpoint.files.parts import TensorInfo
from k25_train.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Amount:
    """Of some tensors."""

    num_tensors: int = 0
    num_elements: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.num_tensors + other.num_tensors,
            self.num_elements + other.num_elements,
            self.num_bytes + other.num_bytes,
        )


def amounts(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[State, Amount]]:
    """Part of the model -> what is kept of it -> how much; parts and states without tensors are left out."""
    found: dict[str, dict[State, Amount]] = {part: {} for part in PARTS}
    for name, info in tensors.items():
        row, state = found[part_of(name)], state_of(name)
        row[state] = row.get(state, Amount()) + Amount(1, info.numel, info.num_bytes)
    return {part: row for part, row in found.items() if row}


@dataclass(frozen=True, slots=True)
class Alike:
    """Tensors that differ in the number of their layer alone, or a single one."""

    name: str
    """With the numbers of all: `layers.{1-60}`."""
    members: tuple[str, ...]
    info: TensorInfo
    """Of each."""

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return len(self.members) * self.info.num_bytes

    def statistics(self, by_name: Mapping[str, Statistics]) -> Statistics:
        """Of all their elements."""
        return reduce(Statistics.__add__, (by_name[name] for name in self.members), Statistics())

    def largest(self, by_name: Mapping[str, Statistics]) -> str:
        """The member with the largest element, or with values that are not finite."""
        return max(self.members, key=lambda name: (by_name[name].num_not_finite, by_name[name].max_abs))


def alike(tensors: Mapping[str, TensorInfo]) -> list[Alike]:
    """Tensors together that differ in the number of their layer, in the order of the forward pass."""
    found = []
    for names in by_pattern(tensors).values():
        by_info: dict[TensorInfo, list[str]] = {}
        for name in names:
            by_info.setdefault(tensors[name], []).append(name)
        found += [Alike(common_name(group), tuple(group), info) for info, group in by_info.items()]
    return sorted(found, key=lambda each: place_of(each.members[0]))


def in_order(names: Iterable[str]) -> list[str]:
    """Names as people count: layer 2 before layer 10."""
    return sorted(
        names,
        key=lambda name: [(len(part), part) if part.isdecimal() else (0, part) for part in name.split(".")],
    )


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names in which one of the patterns is found, which may have `*`, `?` and `[…]` as of a shell.

    Raises ConfigError for a pattern that fits none.
    """
    known = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        fits = [name for name in known if fnmatchcase(name, f"*{pattern}*")]
        if not fits:
            raise ConfigError(
                f"--tensors {pattern}: fits none of the {len(known):,} tensors, such as {min(known)}: "
                "give a part of a name, such as 'layers.1?.mlp'"
                if known
                else f"--tensors {pattern}: there are no tensors"
            )
        chosen.update(fits)
    return in_order(chosen)
