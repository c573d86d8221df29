"""Whether all ranks are of one job: what each says of itself, compared. Pure; who asks them is elsewhere.

A rank states a digest for each kind of fact. Only where digests differ, one rank for each of them is asked
for its values: what thousands of ranks agree about costs some bytes each.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from k25_train.joining.words import Member, some_of

Facts = Mapping[str, Mapping[str, str]]
"""Kind -> name of a fact -> its value."""
UNSTATED = "unstated"
"""In place of the digest of a rank that states none, as one of another version of the code."""
NOT_SET = "not set"
"""In place of the value of a fact that a rank does not have."""
OTHER = "other values"
"""In place of the values of ranks that were not asked."""
MAX_GROUPS = 8
"""Digests of a kind whose values are asked for, the most frequent ones first."""
MAX_FACTS = 12
"""Differences of a kind that an error names."""
MAX_LENGTH = 200
"""Characters of a value that an error shows."""


class Kind(NamedTuple):
    """A kind of facts that all ranks must have alike."""

    name: str
    remedy: str
    """What to do where they differ."""
    per_node: bool = False
    """Whether the first rank of a node speaks for all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement(Member):
    """What a rank says before it builds anything."""

    local_rank: int
    """Index among the ranks of its node."""
    digests: dict[str, str] = field(default_factory=dict)
    """Kind -> digest of its facts."""


class Difference(NamedTuple):
    """A fact that ranks do not have alike."""

    kind: Kind
    name: str
    values: list[tuple[str, list[Statement]]]
    """Its values with the ranks that have them, the most frequent one first."""


def digest(facts: Mapping[str, str]) -> str:
    """A short text that differs where facts do."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def to_ask(statements: Sequence[Statement], kinds: Iterable[Kind]) -> dict[str, list[int]]:
    """Kinds that ranks do not have alike -> the ranks whose values tell how: the first one with each digest,
    the most frequent digest first. Empty if all agree."""
    asked = {}
    for kind in kinds:
        groups = _groups(statements, kind)
        if len(groups) > 1:
            asked[kind.name] = [group[0].rank for group in groups[:MAX_GROUPS]]
    return asked


def differences(
    statements: Sequence[Statement], values: Mapping[int, Facts], kinds: Iterable[Kind]
) -> list[Difference]:
    """Every fact that ranks do not have alike.

    Args:
        statements: of all ranks that answer.
        values: rank -> its facts, of those that `to_ask` names; one that does not answer is left out.
        kinds: in the order in which they are told.
    """
    found: list[Difference] = []
    for kind in kinds:
        groups = _groups(statements, kind)
        known = {group[0].rank: values.get(group[0].rank, {}).get(kind.name) for group in groups}
        own = [(group, known[group[0].rank]) for group in groups]
        if len(groups) < 2:
            continue
        names = dict.fromkeys(name for _, facts in own if facts is not None for name in facts)
        compared = [_compared(kind, name, own) for name in names]
        differing = [one for one in compared if len(one.values) > 1]
        # A rank of another version may say nothing at all.
        found += differing or [Difference(kind, "", [("", group) for group, _ in own])]
    return found


def _groups(statements: Sequence[Statement], kind: Kind) -> list[list[Statement]]:
    """Ranks that say the same, the largest group first; the first of a group speaks for it."""
    speakers = [each for each in statements if each.local_rank == 0 or not kind.per_node]
    by_digest: dict[str, list[Statement]] = {}
    for statement in sorted(speakers, key=lambda each: each.rank):
        by_digest.setdefault(statement.digests.get(kind.name, UNSTATED), []).append(statement)
    return sorted(by_digest.values(), key=lambda group: (-len(group), group[0].rank))


def _compared(
    kind: Kind, name: str, groups: Sequence[tuple[list[Statement], Mapping[str, str] | None]]
) -> Difference:
    """One fact over all groups whose values are known."""
    by_value: dict[str, list[Statement]] = {}
    for group, facts in groups:
        if facts is not None:
            by_value.setdefault(facts.get(name, NOT_SET), []).extend(group)
    others = [statement for group, facts in groups if facts is None for statement in group]
    if others and len(by_value) > 1:
        by_value[OTHER] = others
    ordered = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[1][0].rank))
    return Difference(kind, name, ordered)


def describe(found: Sequence[Difference], statements: Sequence[Statement]) -> str:
    """All differences as one text, by kind with its remedy."""
    lines = ["the ranks are not of one job"]
    for kind in dict.fromkeys(one.kind for one in found):
        own = [one for one in found if one.kind == kind]
        lines.append(f"  {kind.name}: has to be the same on all ranks")
        lines += [f"    {line_of(one, statements)}" for one in own[:MAX_FACTS]]
        if len(own) > MAX_FACTS:
            lines.append(f"    and {len(own) - MAX_FACTS} more")
        lines.append(f"    -> {kind.remedy}")
    return "\n".join(lines)


def line_of(one: Difference, statements: Sequence[Statement]) -> str:
    """A difference in one line: `optim.lr: 0.001 on node 0 (host a, ranks 0-7), 0.002 on node 1 (…)`."""
    places = [
        (value, some_of(with_nodes(group, one.kind, statements), statements)) for value, group in one.values
    ]
    if not one.name:
        return f"differs between {'; '.join(place for _, place in places)}"
    return f"{one.name}: " + ", ".join(f"{_shortened(value)} on {place}" for value, place in places)


def with_nodes(group: Sequence[Statement], kind: Kind, statements: Sequence[Statement]) -> list[Statement]:
    """The ranks that a group speaks for."""
    if not kind.per_node:
        return list(group)
    nodes = {statement.node for statement in group}
    return [statement for statement in statements if statement.node in nodes]


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_LENGTH else f"{value[:MAX_LENGTH]}…"
