"""Families of tasks by name."""

from collections.abc import Callable, Mapping
from typing import Any

from k25_train.environments.counting import Counting
from k25_train.environments.family import Family
from k25_train.environments.sums import Sums
from k25_train.errors import ConfigError

FAMILIES: dict[str, Callable[[Mapping[str, str]], Family[Any]]] = {
    Sums.name: Sums,
    Counting.name: Counting,
}
"""Name in the configuration -> what makes it from its options."""


def make_family(name: str, options: Mapping[str, str] | None) -> Family[Any]:
    """The family of that name. Raises ConfigError for a name that is not known, and for its options."""
    if name not in FAMILIES:
        raise ConfigError(
            f"family={name}: there is no such family of tasks\n  -> use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name](options or {})
