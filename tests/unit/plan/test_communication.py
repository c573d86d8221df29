"""Communication of the report's plan, by hand."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.expert_copies import copies, copies_elsewhere
from k25_train.plan.time.communication import communication
from k25_train.plan.time.expert_exchange import between_nodes
from parallel.dispatcher import Dispatcher


def test_one_process_sends_nothing() -> None:
    alone = compose(["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1"])
    assert communication(alone) == {}


def test_the_reports_plan() -> None:
    """PP16 x VPP2 x EP16 on 256 ranks: 16 replicas, 1024 micro-batches each of 4096 tokens, in bfloat16."""
    volumes = communication(compose(["experiment=k25_pretrain_4k"]))
    tokens, hidden = 16384 * 4096, 7168
    assert volumes["pipeline"].sent_bytes == tokens * hidden * 2 * 31 * 2
    assert volumes["all-to-all"].sent_bytes == tokens * 8 * hidden * 2 * 60 * 4 * 15 / 16
    assert volumes["all-to-all of weights"].payload_bytes == tokens * 8 * 60 * 4 * 2
    experts = 60 * 384 * 3 * 2048 * hidden
    vision = 471_143_920
    dense = 1_026_879_353_328 - experts - vision
    # Experts have no second replica: nothing is reduced or gathered of them. Vision has 256.
    weights_sent = dense * 15 + vision * 255
    assert volumes["reduce-scatter"].sent_bytes == weights_sent * 4
    assert volumes["all-gather"].sent_bytes == weights_sent * 2
    # All matrices go to their owners and back, in bfloat16.
    assert volumes["matrices"].payload_bytes == 1_024_523_726_848 * 2 * 2


def test_experts_in_turn_are_neighbours() -> None:
    """384 experts, eight each time: one of two nodes has all; of 32 ranks with twelve each, one has them
    in two of three cases, and two in the third."""
    config, kind = compose(["experiment=k25_pretrain_4k"]), Dispatcher.deepep
    assert copies(config, 2, kind, routes_in_turn=True) == 1
    assert copies_elsewhere(config, 2, kind, routes_in_turn=True) == 0.5
    assert copies(config, 32, kind, routes_in_turn=True) == pytest.approx((2 * 1 + 1 * 2) / 3)
    assert copies(config, 2, kind) > 1.9
    # One for each expert wherever they are.
    assert copies(config, 2, Dispatcher.alltoall, routes_in_turn=True) == 8


def test_a_token_goes_once_to_each_node_or_once_for_each_expert() -> None:
    """EP16 on two nodes of eight: four of eight experts are elsewhere, nearly always on the other node."""
    config = compose(["experiment=k25_pretrain_4k"])
    exchanged = 16384 * 4096 // 256 * 7168 * 2 * 60 * 4
    assert between_nodes(config, Dispatcher.alltoall)[0] == 4 * exchanged
    # C(192, 8) / C(384, 8), 0.36% of all tokens, have all of their experts where they are.
    for kind in (Dispatcher.deepep, Dispatcher.hybridep, Dispatcher.ncclep):
        assert between_nodes(config, kind)[0] == pytest.approx(0.99637 * exchanged, rel=1e-5)
    # At 85% of a card of 50 GB/s.
    assert between_nodes(config, Dispatcher.alltoall)[1] == pytest.approx(4 * exchanged / (0.85 * 50e9))
    # What NVLink connects needs no card.
    rack = compose(["experiment=k25_pretrain_4k", "cluster.rates.nvlink_ranks=72"])
    assert between_nodes(rack, Dispatcher.alltoall) == (0, 0)
    within = compose(["experiment=k25_pretrain_4k", "parallelism.ep=8"])
    assert all(between_nodes(within, kind) == (0, 0) for kind in Dispatcher)
    once = communication(compose(["experiment=k25_pretrain_4k", "parallelism.dispatcher=deepep"]))
    assert once["all-to-all"].sent_bytes < communication(config)["all-to-all"].sent_bytes


@pytest.mark.parametrize("kind", ["reduce-scatter", "all-gather"])
def test_experts_are_reduced_over_their_own_replicas(kind: str) -> None:
    def sent(*more: str) -> float:
        replicas = ["parallelism=serial", "cluster.gpus_per_node=4", *more]
        return communication(compose(["experiment=smoke", *replicas]))[kind].sent_bytes

    experts = 4 * 8 * 3 * 96 * 128
    assert sent() - sent("parallelism.ep=2") == experts * 4 * (3 - 1)
    assert sent() - sent("parallelism.ep=4") == experts * 4 * 3
