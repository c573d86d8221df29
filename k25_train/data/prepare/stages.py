"""The two stages of a preparation: units to parts, and parts to shards."""

from collections.abc import Sequence, Set

from k25_train.data.prepare.assemble import Shard
from k25_train.data.prepare.parts import PartReport, Parts
from k25_train.data.prepare.skips import Skips
from k25_train.data.prepare.units import Unit
from k25_train.data.prepare.view import View
from k25_train.data.prepare.workers import Workers


def make_parts(
    workers: Workers, units: Sequence[Unit], reports: dict[int, PartReport], skips: Skips, view: View
) -> None:
    """Have every unit made that has no report yet, and count all.

    Raises DataError when too much has been skipped.
    """
    total = sum(unit.num_bytes for unit in units)
    view.start("tokenise", total, skips.done_bytes)
    at_work: dict[int, tuple[int, int]] = {}
    for kind, unit, value in workers.run(unit for unit in units if unit.number not in reports):
        if kind == "progress":
            at_work[unit.number] = value
        elif kind == "done":
            at_work.pop(unit.number, None)
            reports[unit.number] = value
            skips.add(unit, value)
            skips.check(at_end=False)
        done, tokens = (sum(each[i] for each in at_work.values()) for i in (0, 1))
        view.show(skips.done_bytes + done, skips, tokens)
    view.stop()
    skips.check(at_end=True)


def write_shards(
    workers: Workers,
    shards: Sequence[Shard],
    written: Set[int],
    parts: Parts,
    token_bytes: int,
    skips: Skips,
    view: View,
) -> None:
    """Have the shards written that are not, and remove parts when all shards with tokens of theirs are."""
    open_shards = [shard for shard in shards if shard.number not in written]
    total = sum(shard.num_tokens for shard in shards) * token_bytes
    done = total - sum(shard.num_tokens for shard in open_shards) * token_bytes
    view.start("write", total, done)
    uses: dict[int, int] = {}
    for shard in open_shards:
        for each in shard.slices:
            uses[each.unit.number] = uses.get(each.unit.number, 0) + 1
    at_work: dict[int, int] = {}
    for kind, shard, value in workers.run(open_shards):
        if kind == "progress":
            at_work[shard.number] = value
        elif kind == "done":
            at_work.pop(shard.number, None)
            done += shard.num_tokens * token_bytes
            for each in shard.slices:
                uses[each.unit.number] -= 1
                if not uses[each.unit.number]:
                    parts.tokens(each.unit).unlink(missing_ok=True)
        view.show(done + sum(at_work.values()), skips, 0)
    view.stop()
