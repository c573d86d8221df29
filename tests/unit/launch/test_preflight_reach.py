"""Which nodes others can reach: who tries whom, who is to blame, and what a node says of where it listens."""

import socket
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight.findings import Verdict
from launch.preflight.reach import (
    Refusal,
    culprits,
    judge_reach,
    listening,
    neighbours,
    refusals_of,
    try_to_reach,
)

NUM_NODES = 32


def tries(num_nodes: int) -> list[tuple[int, int]]:
    """Who tries whom."""
    return [(node, other) for node in range(num_nodes) for other in neighbours(node, num_nodes)]


def refused(pairs: list[tuple[int, int]]) -> list[Refusal]:
    """All of these tries failed."""
    return [Refusal(source=f"n{a}", target=f"n{b}", reason="no route") for a, b in pairs]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 32, 256])
def test_every_node_is_tried_by_as_many(num_nodes: int) -> None:
    tried = Counter(target for _, target in tries(num_nodes))
    assert len(set(tried.values())) <= 1
    assert all(source != target for source, target in tries(num_nodes))
    assert set(tried) == (set(range(num_nodes)) if num_nodes > 1 else set())


@pytest.mark.parametrize("fails", ["target", "source", "both"])
@given(bad=st.sets(st.integers(0, NUM_NODES - 1), min_size=1, max_size=2))
def test_the_nodes_at_fault_are_named_and_no_other(fails: str, bad: set[int]) -> None:
    """Up to two that take no connection, that make none, or neither."""
    ends = {"source": (0,), "target": (1,), "both": (0, 1)}[fails]
    failing = [pair for pair in tries(NUM_NODES) if any(pair[end] in bad for end in ends)]
    found = culprits(refused(failing))
    assert found == {f"n{node}" for node in bad}


def test_of_two_nodes_neither_is_cleared() -> None:
    assert culprits(refused([(0, 1)])) == {"n0", "n1"}


def test_findings() -> None:
    names = ["n0", "n1", "n2", "n3"]
    found = judge_reach(refused([(0, 2), (1, 2), (3, 2)]), names, names)
    assert found["n2"].verdict is Verdict.failed
    assert "n0 to n2: no route; n1 to n2: no route" in found["n2"].found
    assert {found[name].verdict for name in ("n0", "n1", "n3")} == {Verdict.passed}
    assert judge_reach([], ["n0"], ["n0"])["n0"].verdict is Verdict.skipped


def test_a_node_that_was_not_tried_does_not_pass() -> None:
    """Measuring broke off before, or its leader fell silent."""
    found = judge_reach([], ["n0", "n1"], ["n0"])
    assert [found[name].verdict for name in ("n0", "n1")] == [Verdict.passed, Verdict.skipped]


def test_ranks_are_reported_by_the_names_of_their_nodes() -> None:
    names = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert refusals_of({0: {2: "no route"}, 1: {}}, names) == [
        Refusal(source="a", target="b", reason="no route")
    ]


def test_an_endpoint_can_be_reached_while_it_is_open() -> None:
    with listening("lo") as endpoint:
        assert endpoint.startswith("127.0.0.1 ")
        assert try_to_reach(endpoint) is None
    assert "127.0.0.1" in str(try_to_reach(endpoint)) and "refused" in str(try_to_reach(endpoint))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_so_can_one_of_ipv6() -> None:
    with listening("lo", "ipv6") as endpoint:
        assert endpoint.startswith("::1 ")
        assert try_to_reach(endpoint) is None
    assert str(try_to_reach(endpoint)).startswith("[::1]:")


def test_without_an_interface_the_variable_or_the_host_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with listening(None) as endpoint:
        assert endpoint.startswith("127.0.0.1 ")
    # gloo takes several.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth9")
    with listening(None) as endpoint:
        assert endpoint.startswith("127.0.0.1 ")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with listening(None) as endpoint:
        assert endpoint.partition(" ")[0] == socket.gethostbyname(socket.gethostname())


def test_a_node_that_cannot_listen_says_why() -> None:
    with listening("roce7") as endpoint:
        assert "it cannot listen" in endpoint and "roce7" in endpoint
    assert try_to_reach(endpoint) == endpoint
