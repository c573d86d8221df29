"""What an index leaves out of its files, as the facts of a shard say it."""

from collections.abc import Iterable, Sequence
from typing import Any

from k25_train.data.formats.index_layout import ShardInfo

LISTED = 100
"""Samples of a shard that are told one by one; more are counted. Our choice."""


def facts_of(left_out: Sequence[object]) -> dict[str, Any]:
    """Facts of a shard: how many samples, and the first of them; each text names place and reason."""
    return {"num_left_out": len(left_out), "left_out": [str(each) for each in left_out[:LISTED]]}


def left_out_of(shards: Iterable[ShardInfo]) -> tuple[int, list[str]]:
    """How many samples are left out of files, and the first of each, with place and reason."""
    facts = [shard.facts for shard in shards]
    lines = [str(line) for each in facts for line in each.get("left_out", ())]
    return sum(int(each.get("num_left_out", 0)) for each in facts), lines
