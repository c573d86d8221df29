"""Whether all ranks are of one job: what each says of itself, compared. Pure; who asks them is elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_NAMED = 4
"""Nodes that an error names; a job may have hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a rank says before it builds anything."""

    rank: int
    node: int
    """Index of its node."""
    host: str
    """Name of its machine."""
    facts: Mapping[str, str]
    """What has to be the same on all ranks: name -> value."""

    @property
    def where(self) -> str:
        """Its node, for people."""
        return f"node {self.node} ({self.host})"


def disagreement(statements: Sequence[Statement], remedies: Mapping[str, str]) -> str | None:
    """Every fact that is not the same on all ranks, with its values, where they are, and the remedy; None if
    they agree. `remedies` has all facts."""
    lines: list[str] = []
    for name, remedy in remedies.items():
        by_value: dict[str, list[str]] = {}
        for statement in statements:
            by_value.setdefault(statement.facts.get(name, "unknown"), []).append(statement.where)
        if len(by_value) > 1:
            lines.append(f"  {name} has to be the same on all ranks:")
            lines += [f"    {value} on {some(places)}" for value, places in by_value.items()]
            lines.append(f"    -> {remedy}")
    return "\n".join(["the ranks are not of one job", *lines]) if lines else None


def not_shared(run: str, troubles: Mapping[str, Sequence[str]]) -> str:
    """The error of a folder that is not one on all nodes.

    Args:
        run: the run folder.
        troubles: what is wrong -> on which nodes.
    """
    lines = [f"  {some(places)}: {trouble}" for trouble, places in troubles.items()]
    return "\n".join(
        [
            f"run.dir={run} is not one folder that all nodes share:",
            *lines,
            "  -> choose a folder on a file system that every node has mounted, and may write to: each "
            "writes its part of a checkpoint there",
        ]
    )


def some(places: Iterable[str]) -> str:
    """The first few of some places, each once."""
    distinct = list(dict.fromkeys(places))
    more = f" and {len(distinct) - MAX_NAMED} more" if len(distinct) > MAX_NAMED else ""
    return ", ".join(distinct[:MAX_NAMED]) + more
