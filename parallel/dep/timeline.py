"""When each pass of a pipeline runs, and when its ranks are idle. Pure; standard library only.

`schedule_of` gives the order in which megatron-core's schedule runs the passes of one pipeline rank:
1F1B, interleaved with virtual stages (pipeline_parallel/schedules.py of 0.19.2;
tests/distributed/test_schedule_order.py compares it with real ranks). `simulate` plays such lists against
durations, with other work laid between the passes.

A pass starts when its rank is free and its input has come. Sending costs the sender nothing and waits for
nobody: receivers are taken to have room. Of passes that `overlap_expert_comm` runs beside each other both
inputs are needed to start, and both outputs are there at the end.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one chunk of a pipeline rank."""

    is_forward: bool
    vp_stage: int
    """Which of the rank's chunks."""
    micro_batch: int
    runs_beside_next: bool = False
    """Whether it is run together with the rank's next pass, as one."""


class ScheduleError(ValueError):
    """Passes and work that wait for each other, or for what never comes."""


def schedule_of(
    pp: int, vpp: int, num_micro_batches: int, group_size: int, stage: int, *, overlaps: bool = False
) -> list[Pass]:
    """Passes of pipeline rank `stage`, in order.

    Args:
        group_size: micro-batches that run through one virtual stage before the next one has its turn
            (`parallel.micro_batches`); of no effect if vpp is 1.
        overlaps: `overlap_expert_comm`: interleaved ranks run one more forward pass ahead, and from then on
            each forward pass beside a backward pass.
    """
    forward = _turns(vpp, num_micro_batches, group_size if vpp > 1 else num_micro_batches)
    num_ahead = pp - stage - 1
    if vpp > 1:
        num_ahead = 2 * num_ahead + (vpp - 1) * group_size + overlaps
    num_ahead = min(num_ahead, len(forward))
    passes = [Pass(True, *turn) for turn in forward[:num_ahead]]
    backward = [Pass(False, vpp - 1 - vp_stage, number) for vp_stage, number in forward]
    for turn, after in zip(forward[num_ahead:], backward, strict=False):
        passes += [Pass(True, *turn, overlaps and vpp > 1), after]
    return passes + backward[len(forward) - num_ahead :]


def _turns(vpp: int, num_micro_batches: int, group_size: int) -> list[tuple[int, int]]:
    """(virtual stage, micro-batch) in the order of forward passes: group by group through each chunk."""
    return [
        (vp_stage, number)
        for first in range(0, num_micro_batches, group_size)
        for vp_stage in range(vpp)
        for number in range(first, min(first + group_size, num_micro_batches))
    ]
