"""The order in which a pipeline rank runs its passes. Pure; standard library only.

`schedule_of` gives the order in which megatron-core's schedule runs the passes of one pipeline rank: 1F1B,
interleaved if there are virtual stages. tests/distributed/test_schedule_order.py holds it against real ranks.
"""

from typing import NamedTuple

BACKWARD_COST = 2
"""Cost of a backward pass in forward passes of the same layers: it has two matrix products for each of the
forward pass, one for the gradient of the input and one for that of the weight."""
RECOMPUTE_AND_BACKWARD_COST = 1 + BACKWARD_COST
"""Cost of a backward pass that runs the forward pass again, in forward passes of the same layers."""


class PassKey(NamedTuple):
    """One micro-batch in one chunk of a pipeline rank: shared by its forward pass and its backward pass."""

    vp_stage: int
    micro_batch: int


class Pass(NamedTuple):
    """One micro-batch through one chunk of a pipeline rank."""

    is_forward: bool
    """Direction of the pass."""
    vp_stage: int
    """Index of the chunk on its rank."""
    micro_batch: int
    """Number of the micro-batch within the step."""
    overlaps_next: bool = False
    """Whether it runs overlapped with the rank's next pass, as one."""

    @property
    def key(self) -> PassKey:
        """What this pass shares with the one in the other direction."""
        return PassKey(self.vp_stage, self.micro_batch)


def schedule_of(
    pp: int, vpp: int, num_micro_batches: int, group_size: int, stage: int, *, overlaps: bool = False
) -> list[Pass]:
    """Passes of pipeline rank `stage`, in order.

    Args:
        pp: pipeline ranks.
        vpp: virtual stages, which are chunks per rank.
        num_micro_batches: micro-batches of a step.
        group_size: micro-batches that run through one virtual stage before the next one's turn
            (`parallel.pipeline.micro_batches`); without effect if vpp is 1.
        stage: pipeline rank.
        overlaps: `overlap_expert_comm`. Ranks with virtual stages, and those of a pipeline of one, run one
            more forward pass ahead, and each later forward pass overlapped with a backward pass.
    """
    interleaved = vpp > 1
    overlaps = overlaps and (interleaved or pp == 1)
    # 1. Warm-up: forward passes ahead of the first backward pass, as many as megatron-core runs.
    turns = _turns(vpp, num_micro_batches, group_size if interleaved else num_micro_batches)
    num_ahead = pp - stage - 1
    if interleaved:
        num_ahead = 2 * num_ahead + (vpp - 1) * group_size
    num_ahead = min(num_ahead + overlaps, len(turns))
    passes = [Pass(True, *turn) for turn in turns[:num_ahead]]
    # 2. Steady phase: one forward, one backward; backward visits a rank's chunks in reverse.
    backward = [Pass(False, vpp - 1 - vp_stage, number) for vp_stage, number in turns]
    for turn, after in zip(turns[num_ahead:], backward, strict=False):
        passes += [Pass(True, *turn, overlaps), after]
    # 3. Cool-down: the rest of the backward passes.
    return passes + backward[len(turns) - num_ahead :]


def _turns(vpp: int, num_micro_batches: int, group_size: int) -> list[tuple[int, int]]:
    """(virtual stage, micro-batch) in the order of forward passes: each group through chunk after chunk."""
    return [
        (vp_stage, number)
        for first in range(0, num_micro_batches, group_size)
        for vp_stage in range(vpp)
        for number in range(first, min(first + group_size, num_micro_batches))
    ]
