"""Run one pass of megatron-core's pipeline schedule over micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.utils import get_model_config
from torch import Tensor

from parallel.megatron.before_pass import BeforePass, WorkBeforePasses
from parallel.megatron.held_weights import held_weights
from parallel.megatron.patches.pass_hooks import subscribed
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.topology import Topology

LossOutput = tuple[Tensor, Tensor, Any]
"""(sum of losses, number of tokens with a loss, what to report of this micro-batch)."""
ForwardOutput = tuple[Tensor | AbstractSchedulePlan, Callable[[Tensor], LossOutput]]
"""A chunk's output or the plan of its pass, and the function from the last chunk's output to its losses."""


def run_schedule[Batch](
    forward: Callable[[Batch, torch.nn.Module, bool], ForwardOutput],
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Batch],
    topology: Topology,
    *,
    tokens_per_micro_batch: int,
    forward_only: bool = False,
    balance_loss_scale: float = 1.0,
    before_pass: Sequence[BeforePass] = (),
) -> list[Any]:
    """Forward (and backward) of all micro-batches through the pipeline: 1F1B, interleaved if vpp > 1.

    Args:
        forward: computes one micro-batch with one chunk; returns the chunk's output and, for the last chunk,
            the function from that output to its losses. If its third argument is true, it returns the plan of
            the pass instead of the output: the schedule overlaps it with another micro-batch's backward
            (`parallelism.overlap_expert_comm`).
        chunks: this rank's model chunks.
        micro_batches: this data-parallel rank's micro-batches; every chunk sees each of them.
        tokens_per_micro_batch: of a whole one, padding included; ranks that share it send each other their
            even parts.
        forward_only: no backward passes, as in an evaluation.
        balance_loss_scale: what the gradient of the router's balance loss is multiplied by.
        before_pass: called in turn where this rank is about to wait, with the number of passes that it has
            completed (see `WorkBeforePasses`).

    Returns what the loss function reports for each micro-batch; empty except on the last stage.
    """

    def forward_step(
        iterator: Any, chunk: torch.nn.Module, return_schedule_plan: bool = False
    ) -> ForwardOutput:
        return forward(next(iterator), chunk, return_schedule_plan)

    # These two are read from the chunks' configuration at every call, and differ from call to call.
    config = get_model_config(chunks[0])
    # Made on the device once: a number would be copied there in every pass, and the host would wait.
    scale = torch.full((), balance_loss_scale, device=topology.device)
    config.moe_grad_scale_func = lambda: scale
    if topology.vpp_size > 1:
        group_size = micro_batch_group_size(len(micro_batches), topology.pp_size)
        config.microbatch_group_size_per_vp_stage = group_size
    schedule = get_forward_backward_func(
        pp_size=topology.pp_size, vp_size=topology.vpp_size if topology.vpp_size > 1 else None
    )
    iterators = [iter(micro_batches) for _ in chunks]
    with subscribed(WorkBeforePasses(before_pass)), held_weights(chunks):
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=tokens_per_micro_batch,
            micro_batch_size=1,
            forward_only=forward_only,
        )
