"""Which passes are worth offloading, and when to prefetch them. Pure; standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline.schedule import Pass, PassKey


@dataclass(frozen=True, slots=True)
class OffloadOrder:
    """When to save and to prefetch in a step of one pipeline rank."""

    stay: frozenset[PassKey]
    """Passes that are not offloaded: their backward passes follow too soon for that."""
    prefetch: dict[int, tuple[PassKey, ...]]
    """Position of a pass -> passes whose tensors are prefetched as it starts, in the order of need."""


def offload_order(passes: Sequence[Pass], num_ahead: int = 2) -> OffloadOrder:
    """Prefetch each pass `num_ahead` passes before its backward pass; 2 is the backward before it in 1F1B.

    Args:
        passes: those of one rank, in order (`parallel.pipeline.schedule.schedule_of`). Passes that run as one
            count as one, which starts with the first of them.
        num_ahead: at least 1. A larger one hides longer copies, and holds more passes on the device.

    Raises `ValueError` for a smaller `num_ahead`.
    """
    if num_ahead < 1:
        raise ValueError(f"num_ahead = {num_ahead}: must be at least 1, or nothing is prefetched")
    # 1. Turns: passes that run as one share a turn.
    starts = [
        position for position in range(len(passes)) if not (position and passes[position - 1].overlaps_next)
    ]
    ends = [*starts[1:], len(passes)]
    forward_turn: dict[PassKey, int] = {}
    stay: set[PassKey] = set()
    prefetch: dict[int, tuple[PassKey, ...]] = {}
    # 2. A pass stays if its backward turn comes before it could leave and return.
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
