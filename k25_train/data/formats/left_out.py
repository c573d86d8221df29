"""What an index leaves out of its files, as the facts of a shard say it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from k25_train.data.formats.index_layout import ShardInfo

LISTED = 100
"""Samples of a shard that are told one by one; more are counted. Our choice."""

MAX_CHARACTERS = 500
"""Of what is told of one sample. Our choice."""


def facts_of(left_out: Sequence[object], number: int | None = None) -> dict[str, Any]:
    """Facts of a shard: how many samples, and the first of them; each text names place and reason.

    `number`: how many there are, where `left_out` has the first of them only.
    """
    count = len(left_out) if number is None else number
    return {"num_left_out": count, "left_out": [_shown(str(each)) for each in left_out[:LISTED]]}


def _shown(line: str) -> str:
    """A line that any file and terminal takes, though it quotes data from anyone."""
    short = line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}…"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in short)


def joined(facts: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a shard of two parts of it: what is left out is added, others are those of the first part."""
    found = {**others, **facts}
    if "num_left_out" in facts and "num_left_out" in others:
        found["num_left_out"] = facts["num_left_out"] + others["num_left_out"]
        found["left_out"] = [*facts["left_out"], *others["left_out"]][:LISTED]
    return found


def left_out_of(shards: Iterable[ShardInfo]) -> tuple[int, list[str]]:
    """How many samples are left out of files, and the first of each, with place and reason."""
    facts = [shard.facts for shard in shards]
    lines = [str(line) for each in facts for line in each.get("left_out", ())]
    return sum(int(each.get("num_left_out", 0)) for each in facts), lines
