"""What is worth offloading, and when it has to be on its way back. Pure; standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline.schedule import Pass, PassKey


@dataclass(frozen=True, slots=True)
class OffloadOrder:
    """When to save and to prefetch in a step of one pipeline rank."""

    stay: frozenset[PassKey]
    """Not offloaded: their backward comes so soon that they would be on their way back at once."""
    prefetch: dict[int, tuple[PassKey, ...]]
    """Position of a pass -> what starts on its way back as the pass starts, in the order of need."""


def offload_order(passes: Sequence[Pass], num_ahead: int = 2) -> OffloadOrder:
    """Bring each key back `num_ahead` passes before its backward: 2 is the backward before it in 1F1B.

    Args:
        passes: of one rank, in order (`parallel.pipeline.schedule.schedule_of`). Those that run beside each
            other count as one, and begin with the first of them.
        num_ahead: at least 1. More hides longer copies and holds more batches on the device.

    Raises `ValueError` for a smaller one.
    """
    if num_ahead < 1:
        raise ValueError(f"num_ahead = {num_ahead}: what is not brought ahead is not prefetched: at least 1")
    starts = [
        position
        for position in range(len(passes))
        if not (position and passes[position - 1].runs_beside_next)
    ]
    ends = [*starts[1:], len(passes)]
    forward_turn: dict[PassKey, int] = {}
    stay: set[PassKey] = set()
    prefetch: dict[int, tuple[PassKey, ...]] = {}
    for turn, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for each in passes[start:end]:
            key = each.key
            if each.is_forward:
                forward_turn[key] = turn
            elif turn - forward_turn[key] <= num_ahead + 1:
                stay.add(key)
            else:
                begin = starts[turn - num_ahead]
                prefetch[begin] = (*prefetch.get(begin, ()), key)
    return OffloadOrder(frozenset(stay), prefetch)
