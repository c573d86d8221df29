"""A legal configuration of the shrunk model, and how tests break one of its rules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]
"""Override key -> value."""
Broken = tuple[Values, str, str]
"""(overrides, key that the report names, words of the rule)."""


@dataclass(frozen=True, slots=True)
class Legal:
    """A legal configuration of the shrunk model, and how to choose among wrong values."""

    values: Values
    pick: Callable[[Sequence[Any]], Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def world_size(self) -> int:
        return self["cluster.nodes"] * self["cluster.gpus_per_node"]

    @property
    def dp(self) -> int:
        return self.world_size // self["parallelism.pp"]

    @property
    def unit(self) -> int:
        """Sequences of one micro-batch on every data-parallel rank."""
        return self["train.micro_batch_size"] * self.dp
