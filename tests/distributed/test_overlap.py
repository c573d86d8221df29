"""Expert communication overlapped with computation, and deferred weight gradients: the numbers of the plain
schedule, in another order of work."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, losses_of, overrides, start_run

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
OVERLAP = "parallelism.overlap_expert_comm=true"
BOTH = (OVERLAP, "parallelism.delay_wgrad=true")
LAYOUTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "ep2": ({"ep": 2, "dp": 2}, ()),
    "one expert a rank": ({"ep": 4, "dp": 4}, ()),
    "pp2 x vpp2 x ep2": ({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, ()),
    "pp2 x vpp2 x ep2, bfloat16": ({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, ("train.dtype=bfloat16",)),
    "a last chunk without layers": (
        {"pp": 2, "vpp": 2, "ep": 2, "dp": 2},
        ("parallelism.layout='Et|ttt|t|L'",),
    ),
}


SLOW = ("ep2",)
"""What others go beyond, for `make test-slow`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_overlap_and_delayed_wgrads_change_no_bit(name: str, data: Path, tmp_path: Path) -> None:
    sizes, more = LAYOUTS[name]
    num_ranks = sizes.get("pp", 1) * sizes["dp"]

    def losses(*flags: str) -> list[tuple[float, float]]:
        return losses_of(overrides(data, tmp_path, *layout(**sizes), *SHORT, *more, *flags), num_ranks)

    plain = losses()
    assert losses(*BOTH) == plain
    if name == "pp2 x vpp2 x ep2":
        assert losses(OVERLAP) == plain


def order_of_work(context: RankContext, arguments: Sequence[str]) -> list[str]:
    """What one step of training does on this rank, in order."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.transformer.moe import token_dispatcher

    from k25_train.training import step
    from parallel.megatron.wgrad import WeightGradients

    events: list[str] = []

    def record(owner: Any, name: str, event: str | Callable[..., str]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(event if isinstance(event, str) else event(*args))
            return original(*args, **kwargs)

        setattr(owner, name, call)

    record(step, "forward_micro_batch", "chunk")
    record(token_dispatcher, "all_to_all", "all-to-all")
    record(WeightGradients, "add", lambda wgrads, *_: "put off" if wgrads.later else "wgrad")
    record(WeightGradients, "compute", lambda wgrads: f"compute {len(wgrads.pending)}")
    record(P2PCommunicator, "send_backward_recv_backward", "exchange gradients")
    run = start_run(context, arguments)
    with run.data:
        step.train_step(run, 1)
    return events


def orders(data: Path, run: Path, *more: str, **sizes: int) -> list[str]:
    """The order of work of each rank in a step of 4 micro-batches through 1 dense and 3 MoE layers."""
    arguments = overrides(data, run, *layout(**sizes), "model.num_layers=4", *more)
    by_rank = run_ranks(order_of_work, sizes.get("pp", 1) * sizes["dp"], arguments)
    return [", ".join(events) for events in by_rank]


LINEARS_OF_ATTENTION, LINEARS_OF_SWIGLU = 5, 2
"""Weights of megatron-core's linear layers; the experts of a layer are two stacked weights of one module."""


def test_the_next_micro_batch_is_dispatched_before_the_wgrads_of_the_experts(
    data: Path, tmp_path: Path
) -> None:
    plain, overlapped = (orders(data, tmp_path, *more, ep=2, dp=2) for more in ((), BOTH))
    dispatch_amid_backward = "put off, put off, all-to-all, all-to-all, compute 2"
    for events in overlapped:
        # Layer by layer, forward from the first while backward runs from the last: the dense has no exchange.
        assert events.count(dispatch_amid_backward) == 2 * 3, "2 of 3 MoE layers, all micro-batches but one"
        dense_layer = LINEARS_OF_ATTENTION + LINEARS_OF_SWIGLU
        moe_layer = LINEARS_OF_ATTENTION + LINEARS_OF_SWIGLU + 2
        assert events.count("put off") == 4 * (dense_layer + 3 * moe_layer)
        computed = sum(int(event.split()[1]) for event in events.split(", ") if event.startswith("compute"))
        assert computed == events.count("put off")
    assert all("put off" not in events for events in plain)


def test_gradients_are_sent_before_the_wgrads_of_the_first_layer(data: Path, tmp_path: Path) -> None:
    attention_and_shared_experts = "compute 1, " * (LINEARS_OF_ATTENTION + LINEARS_OF_SWIGLU)
    even = "parallelism.layout='Et|t|t|tL'"
    for events in orders(data, tmp_path, *BOTH, even, pp=2, vpp=2, ep=2, dp=2)[2:]:
        assert events.count(f"exchange gradients, {attention_and_shared_experts}") >= 4


def test_one_more_micro_batch_warms_up(data: Path, tmp_path: Path) -> None:
    sizes = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
    plain, overlapped = (orders(data, tmp_path, *more, **sizes) for more in ((), (OVERLAP,)))

    def warm_up(events: str) -> int:
        return events.split("exchange gradients")[0].count("chunk")

    # (stages after this one) * 2 + (vpp - 1) * pp passes, as in interleaved 1F1B.
    assert [warm_up(events) for events in plain] == [4, 4, 2, 2]
    assert [warm_up(events) for events in overlapped] == [5, 5, 3, 3]
