"""The budget of a step: its rows against figures that are known otherwise, and what changes them."""

from math import comb

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.budget import StepBudget
from k25_train.plan.time.expert_exchange import expert_exchange
from k25_train.plan.time.optimizer import slowest_optimizer

K25 = ("experiment=k25_pretrain_4k", "parallelism.dispatcher=alltoall")


def budget(*overrides: str, nodes: int = 32) -> StepBudget:
    return StepBudget(plan_pipeline(compose([*K25, f"cluster.nodes={nodes}", *overrides])))


def seconds(found: StepBudget) -> dict[str, float]:
    return {row.what: row.seconds for row in found.rows}


@pytest.fixture(scope="module")
def at_256() -> StepBudget:
    return budget()


def test_the_models_flops_are_the_planners(at_256: StepBudget) -> None:
    # 1,024 micro-batches of 134.6 ms on a stage with 4 layers of experts.
    assert at_256.model_s == pytest.approx(1024 * 0.1346, rel=1e-3)
    assert [len(chunk.layers) for chunk in at_256.stage.chunks] == [2, 2]


def test_idle_time_is_what_the_simulated_pipeline_waits(at_256: StepBudget) -> None:
    # Interleaved 1F1B idles for (pp - 1) of pp·vpp... passes of a chunk; uneven chunks add to it.
    at_least = 15 / (2 * 1024) * at_256.model_s
    assert at_least < seconds(at_256)["pipeline's idle time"] < 10 * at_least


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


def test_overlap_hides_exchanges_but_for_fill_and_drain(at_256: StepBudget) -> None:
    overlapped = seconds(at_256)
    plain = seconds(budget("parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false"))
    assert overlapped["experts' exchange, not hidden"] == 0.0
    per_layer = 4 * expert_exchange(compose([*K25])).seconds
    assert plain["experts' exchange, not hidden"] == pytest.approx(1024 * 4 * per_layer)
    # 15 stages to fill, 18 warm-up passes of the last one, two layers a pass.
    assert overlapped["experts' exchange, fill and drain"] == pytest.approx(33 * 2 * per_layer, rel=0.05)


def test_without_transformer_engine_as_much_is_moved(at_256: StepBudget) -> None:
    """Products add to `main_grad` all the same, and rows are gathered and added up in one pass."""
    fused, plain = seconds(at_256), seconds(budget("train.transformer_engine=false"))
    assert fused["weight gradients added"] == plain["weight gradients added"] == 0.0
    assert fused["permutation"] == plain["permutation"]


def test_small_products_wait_for_what_they_add_to() -> None:
    few = seconds(budget("train.seq_len=512", "train.global_batch_size=131072"))
    # 8 bytes for each of 1.057e9 weights in 8 times the passes, less what the products take.
    assert few["weight gradients added"] > 0.5 * 1.057e9 * 8 * 8 * 4096 / 2850e9


def test_what_is_in_the_rate_is_not_added(at_256: StepBudget) -> None:
    shown = {row.what for row in at_256.rows if row.in_rate}
    assert shown == {"SMs of the exchange", "permutation", "router"}
    added = sum(row.seconds for row in at_256.rows if row.what not in shown)
    assert at_256.rest_s == added
    assert at_256.share == added / at_256.model_s


def test_the_optimizer_is_bound_by_its_slowest_part() -> None:
    """Of the stage that takes longest, as the view of the optimizer says."""
    found = budget("optim.muon.newton_schulz_dtype=float32")
    times = slowest_optimizer(found.pipeline)
    # 2.02e14 FLOPs per rank at 50 TFLOP/s.
    assert times.newton_schulz_s == pytest.approx(4.04, rel=0.01)
    assert seconds(found)["optimizer"] == times.total_s >= times.newton_schulz_s
    rounded = budget("optim.muon.newton_schulz_dtype=bfloat16", "optim.muon.exchange_dtype=bfloat16")
    # Masters and momentum of 4.27e9 parameters at 20 GB/s, and half a GB before and after.
    streamed_s = 4.27e9 * 8 / 20e9
    assert streamed_s < seconds(rounded)["optimizer"] == pytest.approx(streamed_s + 0.05, rel=0.01)


def test_more_ranks_share_what_is_shared() -> None:
    few, many = seconds(budget()), seconds(budget(nodes=512))
    assert many["recomputation"] == pytest.approx(few["recomputation"] / 16)
    assert many["host between steps"] == few["host between steps"]
    assert many["gradients reduced"] > few["gradients reduced"]
