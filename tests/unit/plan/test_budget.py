"""The budget of a step: its rows against figures that are known otherwise, and what changes them."""

from collections.abc import Iterable
from functools import cache
from math import comb

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.budget import OF_THE_LAYOUT, StepBudget
from k25_train.plan.time.budget_of_layers import exchange_rows, layer_rows
from k25_train.plan.time.budget_of_step import optimizer_rows
from k25_train.plan.time.budget_row import BudgetRow
from k25_train.plan.time.expert_exchange import DISPATCHER_SMS, expert_exchange
from parallel.communicators import MAX_CTAS
from parallel.dispatcher import Dispatcher

K25 = ("experiment=k25_pretrain_4k", "parallelism.dispatcher=alltoall")


@cache
def budget(*overrides: str, nodes: int = 512) -> StepBudget:
    """Of 4,096 ranks, whose steps are short to simulate."""
    return StepBudget(plan_pipeline(compose([*K25, f"cluster.nodes={nodes}", *overrides])))


def seconds(found: StepBudget) -> dict[str, float]:
    return by_name(found.rows)


def by_name(rows: Iterable[BudgetRow]) -> dict[str, float]:
    return {row.what: row.seconds for row in rows}


def test_the_models_flops_are_spread_over_all_ranks() -> None:
    found = budget()
    # 64 micro-batches of 134.6 ms on stages with 4 layers of experts; the last one has less.
    busiest_s = 64 * 0.1346
    assert found.schedule.computes_s(found.stage) == pytest.approx(busiest_s, rel=1e-3)
    assert found.model_s + seconds(found)["stages that compute less"] == pytest.approx(busiest_s, rel=1e-3)
    # 60 layers of experts, a dense one of 0.995 and the head of 2.17 (test_costs.py), over 16 stages.
    assert found.model_s == pytest.approx(busiest_s * (60.995 + 2.17) / 64, rel=1e-3)


def test_idle_time_and_exchanges_are_what_the_simulated_pipeline_takes_longer() -> None:
    found = budget()
    rows, computes_s = seconds(found), found.schedule.computes_s(found.stage)
    assert rows["pipeline's idle time"] > 15 / (2 * 64) * computes_s
    told_s = rows["pipeline's idle time"] + rows["exchange, fill and drain"]
    assert computes_s + told_s == pytest.approx(found.schedule.real.makespan_s)
    # Of 15 hops and 17 passes of warm-up of the last stage, forward and backward, hops alone at least.
    each_s = expert_exchange(found.pipeline.config).seconds
    assert 15 * 2 * 3 * each_s < rows["exchange, fill and drain"] < 33 * 2 * 4 * each_s


def test_exchanges_send_what_each_dispatcher_sends() -> None:
    exchange = expert_exchange(compose([*K25]))
    rows = 4096 * 8
    # Half of the group of 16 is on the other node.
    assert exchange.network_bytes == rows / 2 * 7168 * 2
    assert exchange.received_rows == rows
    once = expert_exchange(compose([*K25, "parallelism.dispatcher=hybridep"]))
    # Eight different experts of 384, of which half are on the other node.
    none_there = comb(192, 8) / comb(384, 8)
    assert once.network_bytes == pytest.approx(4096 * (1 - none_there) * 7168 * 2)
    assert once.received_rows == pytest.approx(4096 * 16 * (1 - comb(360, 8) / comb(384, 8)))
    alone = expert_exchange(compose(["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1"]))
    assert alone.seconds == 0.0


def test_the_all_to_all_takes_the_sms_of_its_communicator_which_keep_card_and_nvlink_busy() -> None:
    exchange = expert_exchange(compose([*K25]))
    assert exchange.sms == DISPATCHER_SMS[Dispatcher.alltoall] == MAX_CTAS["ep"]
    # At 15 GB/s for a channel (`parallel/communicators.py`).
    assert (exchange.network_bytes + exchange.nvlink_bytes) / exchange.seconds <= MAX_CTAS["ep"] * 15e9


def test_without_overlap_nothing_hides_exchanges() -> None:
    plain = plan_pipeline(
        compose([*K25, "parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false"])
    )
    per_layer = 4 * expert_exchange(plain.config).seconds
    rows = by_name(exchange_rows(plain.stages[1]))
    assert rows["experts' exchange, not hidden"] == pytest.approx(1024 * 4 * per_layer)
    assert seconds(budget())["experts' exchange, not hidden"] == 0.0


def test_without_transformer_engine_as_much_is_moved() -> None:
    """Products add to `main_grad` all the same, and rows are gathered and added up in one pass."""
    fused, plain = (
        by_name(layer_rows(plan_pipeline(compose([*K25, *more])).stages[1]))
        for more in ((), ("train.transformer_engine=false",))
    )
    assert fused["weight gradients added"] == plain["weight gradients added"] == 0.0
    assert fused["permutation"] == plain["permutation"]


def test_small_products_wait_for_what_they_add_to() -> None:
    pipeline = plan_pipeline(compose([*K25, "train.seq_len=512", "train.global_batch_size=131072"]))
    # 8 bytes for each of 1.057e9 weights in 8 times the passes, less what the products take.
    few = by_name(layer_rows(pipeline.stages[1]))
    assert few["weight gradients added"] > 0.5 * 1.057e9 * 8 * 8 * 4096 / 2850e9


def test_what_is_in_the_rate_is_not_added() -> None:
    found = budget()
    in_rate = {row.what for row in found.rows if row.in_rate}
    assert in_rate == {"SMs of the exchange", "permutation", "router", "gaps between kernels"}
    added = {name: value for name, value in seconds(found).items() if name not in in_rate}
    assert found.rest_s == sum(added.values())
    assert found.share == found.rest_s / found.model_s
    of_layout = sum(added[name] for name in OF_THE_LAYOUT)
    assert found.code_share == pytest.approx((found.rest_s - of_layout) / found.model_s)


def test_the_optimizer_is_bound_by_its_slowest_part() -> None:
    exact = plan_pipeline(compose([*K25, "optim.muon.newton_schulz_dtype=float32"]))
    # 4.85e16 FLOPs over 256 ranks at 50 TFLOP/s: 3.8 s; a little more on the stage with the most.
    assert by_name(optimizer_rows(exact))["optimizer"] == pytest.approx(3.9, rel=0.05)
    # Masters and momentum of 4.27e9 parameters at 20 GB/s.
    rounded = by_name(optimizer_rows(plan_pipeline(compose([*K25]))))
    assert rounded["optimizer"] == pytest.approx(4.27e9 * 8 / 20e9, rel=0.05)


def test_idle_time_takes_up_the_encoder_in_bubbles() -> None:
    what = "encoder's second forward, exchange"
    upfront, bubbles = seconds(budget())[what], seconds(budget("dep.schedule=bubbles"))[what]
    assert 0 < bubbles < upfront
