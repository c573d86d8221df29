"""How often a stage runs which passes in a step, without going through all of them; torch-free."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of

Uses = Sequence[Mapping[tuple[int | None, int | None], int]]
"""[stage] -> chunks of a forward and a backward pass that run as one, or of one of them -> how often."""


@lru_cache(maxsize=1024)
def uses_of(pp: int, vpp: int, number: int, *, overlaps: bool) -> Uses:
    """What each stage runs in a step of so many micro-batches, in the order of `schedule_of`.

    Groups of micro-batches repeat themselves, so that only the first ones are gone through.
    """
    if not overlaps or (pp > 1 and vpp == 1):
        alone = ({(chunk, None): number, (None, chunk): number} for chunk in range(pp * vpp))
        of_chunks = list(alone)
        return [_added(of_chunks[stage::pp]) for stage in range(pp)]
    group = micro_batch_group_size(number, pp) if vpp > 1 else 1
    num_groups, rest = divmod(number, group)
    found = []
    for stage in range(pp):
        few = min(num_groups, 4 * (vpp > 1) + 4)
        passes = schedule_of(pp, vpp, few * group + rest, group, stage, overlaps=True)
        counts = _counted(passes, stage, pp)
        if few < num_groups:
            # As often as groups are left out: what one more group adds.
            longer = _counted(
                schedule_of(pp, vpp, (few + 1) * group + rest, group, stage, overlaps=True), stage, pp
            )
            for use, times in longer.items():
                counts[use] = counts.get(use, 0) + (num_groups - few) * (times - counts.get(use, 0))
        found.append(counts)
    return found


def _counted(passes: Sequence[Pass], stage: int, pp: int) -> dict[tuple[int | None, int | None], int]:
    counts: dict[tuple[int | None, int | None], int] = {}
    ahead: int | None = None
    for each in passes:
        chunk = each.vp_stage * pp + stage
        if each.overlaps_next:
            ahead = chunk
            continue
        use = (chunk, None) if each.is_forward else (ahead, chunk)
        counts[use] = counts.get(use, 0) + 1
        ahead = None
    return counts


def _added(of_chunks: Sequence[Mapping[tuple[int | None, int | None], int]]) -> Any:
    return {use: number for each in of_chunks for use, number in each.items()}
