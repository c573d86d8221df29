"""The passes that megatron-core runs on real ranks are those of `schedule_of`, in its order. In layouts of
the parity matrix they are those of the plan, and wait for their backward pass as its memory counts them.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.plan.memory.activations import num_held, peak_held
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.step import step_times
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of
from tests.helpers.parallel_sizes import even_layout, parallel_sizes
from tests.helpers.parity import CASES as PARITY
from tests.helpers.parity import EVERYTHING_OVERLAPS, SLOW_CASES, Case, Parity, sweep
from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed

NUMBERS = (2, 3, 4, 5, 8)
"""Micro-batches of a step."""


class Schedule(NamedTuple):
    """What the order of passes depends on."""

    vpp: int
    num_micro_batches: int
    overlaps: bool
    """Whether forward and backward overlap."""


CASES: dict[int, list[Schedule]] = {
    1: [Schedule(1, number, overlaps) for number in (1, *NUMBERS) for overlaps in (False, True)],
    2: [
        *[Schedule(1, number, False) for number in (1, *NUMBERS)],
        *[
            Schedule(vpp, number, overlaps)
            for vpp in (2, 3)
            for number in NUMBERS
            for overlaps in (False, True)
        ],
    ],
    4: [
        *[Schedule(1, number, False) for number in NUMBERS],
        *[Schedule(2, number, overlaps) for number in (4, 5, 8, 11) for overlaps in (False, True)],
    ],
}
"""Pipeline ranks -> what is compared with `schedule_of`."""


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


def record_orders(context: RankContext, pp: int, schedules: Sequence[Schedule]) -> list[list[Pass]]:
    """Passes that this rank of a pipeline of `pp` ranks has run in each case."""
    from megatron.core import parallel_state

    from parallel.megatron.platform import use_platform
    from parallel.topology import build_topology, start_process_group

    device = use_platform("cpu")
    start_process_group(device, timeout_s=60.0)
    orders = []
    for vpp, num_micro_batches, overlaps in schedules:
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


Orders = dict[Schedule, list[list[Pass]]]
"""What depends on the schedule -> [stage] -> passes that it ran."""


@pytest.fixture(scope="module")
def real_orders() -> "RealOrders":
    return RealOrders()


class RealOrders:
    """What real ranks run; each pipeline is started once for all that is asked of it at a time."""

    def __init__(self) -> None:
        self._found: dict[int, Orders] = {}

    def of(self, pp: int, schedules: Sequence[Schedule]) -> Orders:
        """The orders of all of these, on a pipeline of `pp` ranks."""
        found = self._found.setdefault(pp, {})
        missing = [each for each in dict.fromkeys(schedules) if each not in found]
        if missing:
            by_rank = run_ranks(record_orders, pp, pp, missing, timeout_s=300.0)
            found |= dict(zip(missing, map(list, zip(*by_rank, strict=True)), strict=True))
        return found


@pytest.mark.parametrize("pp", CASES)
def test_ranks_run_the_passes_of_schedule_of(pp: int, real_orders: RealOrders) -> None:
    wanted = [*CASES[pp], *(schedule_in(plan) for plan in planned("few") if plan.layout.pp == pp)]
    for schedule, orders in real_orders.of(pp, wanted).items():
        vpp, number, overlaps = schedule
        group_size = micro_batch_group_size(number, pp) if vpp > 1 else 1
        for stage, order in enumerate(orders):
            expected = schedule_of(pp, vpp, number, group_size, stage, overlaps=overlaps)
            assert order == expected, f"rank {stage} of {pp} x {vpp}, {number} micro-batches, {overlaps=}"


LAYOUTS = {
    # Those whose pipelines are run anyway.
    "few": [case for case in PARITY if case not in SLOW_CASES and case.sizes.get("pp", 1) <= 4],
    "all": [*PARITY, *sweep()],
}
"""Layouts of the parity matrix."""


@functools.cache
def planned(which: str) -> list[PipelinePlan]:
    """The plans of layouts, and of the same with everything overlapped where the configuration has it."""
    return [plan_pipeline(compose(arguments)) for case in LAYOUTS[which] for arguments in variants(case)]


def variants(case: Case) -> Iterator[list[str]]:
    parity, sizes = Parity(Path("shards"), Path("run")), {"pp": 1, "vpp": 1, "ep": 1, **case.sizes}
    yield parity.arguments(case)
    if sizes["ep"] > 1 and (sizes["vpp"] > 1 or sizes["pp"] == 1):
        yield [*parity.arguments(case), *EVERYTHING_OVERLAPS]


def schedule_in(plan: PipelinePlan) -> Schedule:
    sizes = plan.config.parallelism
    return Schedule(sizes.vpp, plan.num_micro_batches, sizes.overlap_expert_comm)


@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_plans_have_the_passes_and_what_waits_of_real_ranks(which: str, real_orders: RealOrders) -> None:
    plans = sorted(planned(which), key=lambda plan: plan.layout.pp)
    for pp, group in itertools.groupby(plans, key=lambda plan: plan.layout.pp):
        of_pp = list(group)
        orders = real_orders.of(pp, [schedule_in(plan) for plan in of_pp])
        for plan in of_pp:
            check_plan(plan, orders[schedule_in(plan)])


def check_plan(plan: PipelinePlan, orders: Sequence[Sequence[Pass]]) -> None:
    """Order of passes, starts in the simulated timeline, and passes between forward and backward."""
    timeline = step_times(plan).text
    for stage, order in zip(plan.stages, orders, strict=True):
        where = f"stage {stage.stage} of {plan.config.parallelism}"
        assert stage.passes == order, where
        # Ranks are idle or in one pass, or in two that overlap: these start and end together.
        times_s = zip(timeline.starts_s[stage.stage], timeline.ends_s[stage.stage], strict=True)
        for each, (this, after) in zip(order, itertools.pairwise(times_s), strict=False):
            assert this == after if each.overlaps_next else this[1] <= after[0], where
        # At every moment as many wait, and the most is what memory is planned for.
        waiting = list(itertools.accumulate(1 if each.is_forward else -1 for each in order))
        assert waiting[-1] == 0 <= min(waiting), where
        held = peak_held(stage.passes, lambda _: 1)
        assert num_held(stage) == held == max(waiting), where
