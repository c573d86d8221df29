"""The passes that megatron-core runs on real ranks are those of `schedule_of`, in its order."""

import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch

from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of
from tests.helpers.parallel_sizes import even_layout, parallel_sizes
from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed

NUMBERS = (2, 3, 4, 5, 8)
"""Micro-batches of a step."""
CASES: dict[int, list[tuple[int, int, bool]]] = {
    1: [(1, number, overlaps) for number in (1, *NUMBERS) for overlaps in (False, True)],
    2: [
        *[(1, number, False) for number in (1, *NUMBERS)],
        *[(vpp, number, overlaps) for vpp in (2, 3) for number in NUMBERS for overlaps in (False, True)],
    ],
    4: [
        *[(1, number, False) for number in NUMBERS],
        *[(2, number, overlaps) for number in (4, 5, 8, 11) for overlaps in (False, True)],
    ],
}
"""Pipeline ranks -> (virtual stages, micro-batches, whether forward and backward overlap)."""


class Note(torch.autograd.Function):
    """Adds one, and notes when it is run forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, order: list[Pass], vp_stage: int, micro_batch: int
    ) -> torch.Tensor:
        ctx.order, ctx.place = order, (vp_stage, micro_batch)
        order.append(Pass(True, *ctx.place))
        return values + 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.order.append(Pass(False, *ctx.place))
        return gradients[0], None, None, None


class Chunk(torch.nn.Module):
    """One virtual stage of a pipeline rank, as far as the schedule looks at it."""

    def __init__(self, config: Any, vp_stage: int) -> None:
        super().__init__()
        self.config = config
        self.vp_stage = vp_stage
        self.model_type = None
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self.input = tensors[0]


def record_orders(context: RankContext, pp: int) -> list[list[Pass]]:
    """Passes that this rank of a pipeline of `pp` ranks has run in each case."""
    from megatron.core import parallel_state

    from parallel.megatron.platform import use_platform
    from parallel.topology import build_topology, start_process_group

    device = use_platform("cpu")
    start_process_group(device, timeout_s=60.0)
    orders = []
    for vpp, num_micro_batches, overlaps in CASES[pp]:
        sizes, layout = parallel_sizes(pp=pp, vpp=vpp), even_layout(pp * vpp, pp, vpp)
        topology = build_topology(sizes, layout, device)
        orders.append(record_order(topology, num_micro_batches, overlaps))
        parallel_state.destroy_model_parallel()
    return orders


def record_order(topology: Any, num_micro_batches: int, overlaps: bool) -> list[Pass]:
    """Run the schedule over chunks that add one, each of which checks that its input is the one before's."""
    from megatron.core.pipeline_parallel import combined_1f1b

    from parallel.megatron.patches import pass_hooks
    from parallel.megatron.schedule import run_schedule

    order: list[Pass] = []

    def forward(micro_batch: int, chunk: Any, _: bool) -> Any:
        values = chunk.input
        if values is None:
            values = torch.full((1, 1, 1), 100.0 * micro_batch, requires_grad=True)
        number = topology.layout.chunk_index(topology.pp_rank, chunk.vp_stage)
        assert values.item() == 100 * micro_batch + number, "this is not the output of the chunk before"
        output = Note.apply(values, order, chunk.vp_stage, micro_batch)
        return output, lambda tensor: (tensor.sum(), torch.tensor(1, dtype=torch.int), None)

    def forward_beside_backward(*arguments: Any, **hooks: Any) -> Any:
        before = len(order)
        results = run_both(*arguments, **hooks)
        if len(order) - before == 2:
            order[before] = order[before]._replace(overlaps_next=True)
        return results

    told: set[int] = set()

    def note(num_passes: int) -> None:
        # What is to be done is done at the first call; others come while a pass sends what it has computed.
        assert num_passes in told or num_passes == len(order), "this is called between passes"
        told.add(num_passes)

    # Replaces the function that is hooked, so it gets hooks again, by the parameter names of the original.
    functools.update_wrapper(forward_beside_backward, combined_1f1b.combined_forward_backward_step)
    hooked = pass_hooks.hooked_combined(forward_beside_backward)
    with patch.object(combined_1f1b, "combined_forward_backward_step", hooked):
        run_schedule(
            forward,
            [Chunk(schedule_config(topology, overlaps), vp_stage) for vp_stage in range(topology.vpp_size)],
            list(range(num_micro_batches)),
            topology,
            tokens_per_micro_batch=1,
            forward_only=False,
            before_pass=[note],
        )
    within = {position for position, each in enumerate(order, 1) if each.overlaps_next}
    assert told | {len(order)} == set(range(len(order) + 1)) - within
    return order


def schedule_config(topology: Any, overlaps: bool) -> Any:
    """What the schedule reads, set as for a real model."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    is_interleaved = topology.vpp_size > 1
    config = TransformerConfig(
        num_layers=topology.layout.num_layers,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vpp_size if is_interleaved else None,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        calculate_per_token_loss=True,
    )
    # Not asked for above, since it is refused without experts.
    config.overlap_moe_expert_parallel_comm = overlaps
    return config


def run_both(*arguments: Any, **options: Any) -> Any:
    """Stands in for megatron-core's pass of real layers, with the schedule's hooks where it has them."""
    forward_step, batches, chunk, _, values, _, other, other_input, other_output, gradient, _ = arguments
    output = input_gradient = None
    if chunk is not None:
        call(options.get("pre_forward"), chunk.vp_stage)
        chunk.set_input_tensor([values])
        output, _ = forward_step(batches, chunk)
    if other is not None:
        call(options.get("pre_backward"), other.vp_stage)
        if other_input is not None:
            other_input.retain_grad()
        torch.autograd.backward(other_output, gradient)
        input_gradient = None if other_input is None else other_input.grad
    if chunk is not None:
        call(options.get("post_forward"), output, chunk.vp_stage)
    if other is not None:
        call(options.get("post_backward"), input_gradient, other.vp_stage)
    return output, torch.tensor(1, dtype=torch.int), input_gradient


def call(hook: Any, *arguments: Any) -> None:
    if hook is not None:
        hook(*arguments)


@pytest.mark.parametrize("pp", CASES)
def test_ranks_run_the_passes_of_schedule_of(pp: int) -> None:
    by_rank = run_ranks(record_orders, pp, pp)
    for stage, orders in enumerate(by_rank):
        for (vpp, number, overlaps), order in zip(CASES[pp], orders, strict=True):
            group_size = micro_batch_group_size(number, pp) if vpp > 1 else 1
            expected = schedule_of(pp, vpp, number, group_size, stage, overlaps=overlaps)
            assert order == expected, f"rank {stage} of {pp} x {vpp}, {number} micro-batches, {overlaps=}"
