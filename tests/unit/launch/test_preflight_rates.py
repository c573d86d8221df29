"""Which rank, node or connection preflight calls slow, and which it does not."""

import random

import pytest

from launch.preflight.findings import Verdict
from launch.preflight.groups import plan_rounds
from launch.preflight.rates import Link, Threshold, judge_links, judge_ranks, outliers, slow_links, slow_ranks

THRESHOLD = Threshold(tolerance=0.1, fails=True)
RANKS_PER_NODE = 8
NODES = {rank: f"node-{rank // RANKS_PER_NODE}" for rank in range(64)}


def measured_links(slowdown: dict[int, float], bad: dict[tuple[int, int], float] | None = None) -> list[Link]:
    """Links of pp=4, ep=16 on 64 ranks, 150 GB/s within a node and 45 between them, scattered by 2%;
    `slowdown` divides all of a rank's rates, `bad` those of a pair."""
    draw = random.Random(1)
    links = []
    for one_round in plan_rounds(64, pp=4, ep=16, cp=1):
        for pair in one_round.pairs:
            rate = (150.0 if NODES[pair[0]] == NODES[pair[1]] else 45.0) * draw.uniform(0.98, 1.02)
            for rank in pair:
                rate /= slowdown.get(rank, 1.0)
            rate /= (bad or {}).get(pair, 1.0)
            links.append(Link(pair=pair, gb_per_s=rate))
    return links


@pytest.mark.parametrize("sigma", [10, 40])
def test_scatter_is_no_outlier(sigma: float) -> None:
    """Wider than the tolerance as well: what all of them do is no fault of one."""
    draw = random.Random(0)
    rates = {rank: draw.gauss(500, sigma) for rank in range(256)}
    assert outliers(rates, tolerance=0.1) == {}


def test_wide_scatter_does_not_hide_what_is_slow() -> None:
    """On a busy machine rates differ threefold; one that is a hundredth of them is still an outlier."""
    draw = random.Random(0)
    rates = {rank: draw.uniform(0.3, 0.9) for rank in range(16)} | {16: 0.006}
    assert outliers(rates, tolerance=0.5) == {16: 0.006}


def test_equal_values_leave_room_for_a_share_of_the_median() -> None:
    rates = {0: 100.0, 1: 100.0, 2: 100.0, 3: 91.0, 4: 89.0}
    assert outliers(rates, tolerance=0.1) == {4: 89.0}


def test_two_values_have_no_middle() -> None:
    assert outliers({0: 100.0, 1: 1.0}, tolerance=0.1) == {}


@pytest.mark.parametrize(("rate", "verdict"), [(400.0, Verdict.warned), (200.0, Verdict.failed)])
def test_a_slow_gpu_is_named_with_its_node(rate: float, verdict: Verdict) -> None:
    values = dict.fromkeys(NODES, 500.0) | {13: rate}
    findings = judge_ranks("matrix products", "TFLOP/s", values, NODES, THRESHOLD)
    assert {node for node, one in findings.items() if one.verdict is not Verdict.passed} == {"node-1"}
    assert findings["node-1"].verdict is verdict
    assert findings["node-1"].found == f"rank 13: {rate:.3g} TFLOP/s"
    assert findings["node-0"].found == "500 TFLOP/s"


def test_chance_on_shared_cores_does_not_fail_a_node() -> None:
    values = dict.fromkeys(NODES, 500.0) | {13: 1.0}
    findings = judge_ranks("matrix products", "TFLOP/s", values, NODES, Threshold(tolerance=0.5, fails=False))
    assert findings["node-1"].verdict is Verdict.warned


def test_a_node_that_measured_nothing_does_not_pass() -> None:
    values = dict.fromkeys(range(8), 500.0)
    assert judge_ranks("copy", "GB/s", values, NODES, THRESHOLD)["node-3"].verdict is Verdict.skipped


@pytest.mark.parametrize("missing", [{26}, set(range(24, 32))])
def test_ranks_that_got_nowhere_do_not_pass_with_their_neighbours(missing: set[int]) -> None:
    values = {rank: 500.0 for rank in NODES if rank not in missing}
    links = [link for link in measured_links({}) if not missing & set(link.pair)]
    for findings in (
        judge_ranks("copy", "GB/s", values, NODES, THRESHOLD),
        judge_links("connections", links, NODES, THRESHOLD),
    ):
        bad = {node: one for node, one in findings.items() if one.verdict is not Verdict.passed}
        assert {node: one.verdict for node, one in bad.items()} == {"node-3": Verdict.skipped}
        assert ("ranks [26] did not get to it" if len(missing) == 1 else "no rank") in bad["node-3"].found


def test_a_slow_rank_is_distinguished_from_its_peers() -> None:
    links = measured_links({13: 3.0})
    assert set(slow_ranks(links, NODES, 0.1)) == {13}
    assert slow_links(links, NODES, 0.1, without={13}) == []


def test_a_slow_connection_between_good_ranks_is_named() -> None:
    links = measured_links({}, {(5, 9): 3.0})
    assert slow_ranks(links, NODES, 0.1) == {}
    (slow,) = slow_links(links, NODES, 0.1, without={})
    assert slow.pair == (5, 9)


def test_slower_paths_between_nodes_are_no_outliers() -> None:
    links = measured_links({})
    assert slow_ranks(links, NODES, 0.1) == {}
    assert slow_links(links, NODES, 0.1, without={}) == []


def test_all_ranks_of_a_node_with_a_bad_switch_are_named() -> None:
    """Only what leaves the node is slow. The node that shares its expert groups has good connections too, to
    the stages before and after it, so it is not named."""
    links = [
        Link(pair=link.pair, gb_per_s=link.gb_per_s / 3)
        if {NODES[rank] for rank in link.pair} > {"node-2"}
        else link
        for link in measured_links({})
    ]
    assert set(slow_ranks(links, NODES, 0.1)) == set(range(16, 24))
    findings = judge_links("connections", links, NODES, THRESHOLD)
    assert {node for node, one in findings.items() if one.verdict is not Verdict.passed} == {"node-2"}
    assert findings["node-2"].verdict is Verdict.failed
    assert "rank 16: at best 15" in findings["node-2"].found
    assert findings["node-0"].found.startswith("median 150 GB/s within a node, 44.7")
