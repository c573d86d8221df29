"""Raw rates of cards by perftest: who measures with whom, what is read, and which card is called slow."""

import threading
from collections import Counter
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight import perftest
from launch.preflight.coordination import Coordinator
from launch.preflight.findings import Verdict
from launch.preflight.measurements import judge_measurements
from launch.preflight.network import read_network
from launch.preflight.perftest import RawEnd, RawLink, command, node_rounds, parse_gbps, raw_ends
from launch.preflight.rank import RankMeasurements
from launch.preflight.raw_rates import measure_raw_rates
from launch.preflight.raw_verdicts import judge_raw
from launch.preflight.system import BrokenError, Missing
from tests.helpers.recorded_node import GOLDEN, RecordedNode

OUTPUT = (GOLDEN / "ib_write_bw.txt").read_text()
"""perftest 6.x on RoCE, with --report_gbits, -D and -q."""
CPU_WARNING = (
    "Conflicting CPU frequency values detected: 1500.000000 != 3300.016000. CPU Frequency is not max.\n"
)


def test_the_average_is_read() -> None:
    assert parse_gbps(OUTPUT) == 391.72
    row = " 1048576    93412"
    assert parse_gbps(OUTPUT.replace(row, CPU_WARNING + row)) == 391.72
    # Without a duration, and of older versions, which have no rate of messages.
    short = "#bytes  #iterations  BW peak[Gb/sec]  BW average[Gb/sec]\n 65536  5000  51.05  51.04\n"
    assert parse_gbps(short) == 51.04
    for other in ("", "Couldn't connect to 10.10.2.6:18517", OUTPUT.replace("Gb/sec", "MB/sec"), short[:60]):
        with pytest.raises(BrokenError, match="no average"):
            parse_gbps(other)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 9, 512])
def test_every_node_meets_its_neighbours_once(num_nodes: int) -> None:
    rounds = node_rounds(num_nodes)
    assert len(rounds) <= 3
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    met = Counter(node for pairs in rounds for pair in pairs for node in pair)
    assert set(met.values()) == ({2} if num_nodes > 2 else {1} if num_nodes == 2 else set())


def test_commands() -> None:
    end = RawEnd(device="mlx5_2", port=1, gid_index=3, address="10.10.2.5", rate_gbps=400.0)
    words = command(end, 106, 18517, "10.10.2.6")
    assert " ".join(words) == (
        "ib_write_bw -d mlx5_2 -i 1 -x 3 --tclass=106 -p 18517 -D 2 -q 4 -s 1048576 -F --report_gbits"
        " 10.10.2.6"
    )
    assert command(end, 106, 18517, None) == words[:-1]


def test_ends_are_the_cards_addresses(recorded: RecordedNode, config: Config) -> None:
    fabric = config.cluster.fabric
    hcas = read_network(recorded.system, fabric).in_use(fabric)
    absent = raw_ends(recorded.system, hcas, fabric)
    assert isinstance(absent, Missing) and "install perftest" in absent.reason
    # Status 1, as of --version: it is there.
    recorded.outputs["ib_write_bw --help"] = BrokenError("ib_write_bw --help: status 1: Usage: --ipv6 ...")
    ends = raw_ends(recorded.system, hcas, fabric)
    assert isinstance(ends, dict) and len(ends) == 8
    assert ends["mlx5_2"] == RawEnd(
        device="mlx5_2", port=1, gid_index=3, address="10.10.2.5", rate_gbps=400.0
    )
    ipv6 = compose(["experiment=k25_pretrain_4k", "cluster.fabric.address_family=ipv6"]).cluster.fabric
    old = raw_ends(recorded.system, hcas, ipv6)
    assert isinstance(old, Missing) and "--ipv6-addr" in old.reason


class Perftest:
    """ib_write_bw on two nodes: a client finds a server of its port, the second time that it tries."""

    def __init__(self) -> None:
        self.ports: dict[str, list[str]] = {"server": [], "client": []}
        self.listens = threading.Semaphore(0)
        self.num_refused = 0

    def run(self, words: Sequence[str]) -> str:
        """Run a server, a client, or the help."""
        if words[1] == "--help":
            raise BrokenError("status 1: Usage")
        is_server = "." not in words[-1]
        port = words[words.index("-p") + 1]
        self.ports["server" if is_server else "client"].append(port)
        if is_server:
            self.listens.release()
            return OUTPUT
        if self.num_refused < 1:
            self.num_refused += 1
            raise BrokenError("status 1: Couldn't connect to 10.10.2.6:18517")
        assert self.listens.acquire(timeout=20)
        if words[2] == "mlx5_5":
            raise BrokenError("ib_write_bw: status 1: Failed to modify QP 0x8a to RTR")
        return OUTPUT


def test_two_nodes_measure_all_rails(
    recorded: RecordedNode, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perftest, "SERVER_START_S", 0.01)
    fabric = config.cluster.fabric
    hcas = read_network(recorded.system, fabric).in_use(fabric)
    store, tool = dist.HashStore(), Perftest()
    recorded.answer = tool.run
    found: dict[int, list[RawLink] | Missing] = {}

    def leader(rank: int) -> None:
        own = Coordinator(store, rank=rank, world_size=16, local_rank=0, ranks_per_node=8)
        found[rank] = measure_raw_rates(own, recorded.system, hcas, fabric, 20.0)

    threads = [threading.Thread(target=leader, args=(rank,)) for rank in (0, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == []
    links = found[8]
    assert isinstance(links, list) and [link.card for link in links] == [f"mlx5_{n}" for n in range(8)]
    assert {link.pair for link in links} == {(0, 8)}
    assert [link.gbps for link in links if link.card != "mlx5_5"] == [391.72] * 7
    assert isinstance(links[5].gbps, Missing) and "to RTR" in links[5].gbps.reason
    assert sorted(tool.ports["server"]) == sorted(set(tool.ports["client"]))


def ring(
    num_nodes: int, slow: dict[tuple[int, str], float], bad: dict[tuple[int, int], float]
) -> list[RawLink]:
    """Links of a ring of nodes; `slow` has rates of cards of nodes, `bad` those of pairs."""
    links = []
    for pairs in node_rounds(num_nodes):
        for pair in pairs:
            for card in ("mlx5_0", "mlx5_1"):
                rate = min(392.0, *(slow.get((node, card), 392.0) for node in pair), bad.get(pair, 392.0))
                links.append(RawLink(card=card, pair=pair, gbps=rate, rate_gbps=400.0))
    return links


def judged(links: list[RawLink], num_nodes: int) -> dict[str, tuple[Verdict, str]]:
    names = {node: f"n{node}" for node in range(num_nodes)}
    findings = judge_raw(links, names, list(names.values()), {})
    return {
        node: (one.verdict, one.found) for node, one in findings.items() if one.verdict is not Verdict.passed
    }


@pytest.mark.parametrize(("rate", "verdict"), [(340.0, Verdict.warned), (97.0, Verdict.failed)])
def test_a_slow_card_is_named_and_its_partners_are_not(rate: float, verdict: Verdict) -> None:
    found = judged(ring(9, {(4, "mlx5_1"): rate}, {}), 9)
    assert found == {"n4": (verdict, f"mlx5_1: {rate:.0f} of 400 Gb/s")}


def test_a_slow_connection_between_sound_cards_is_named_at_both_ends() -> None:
    found = judged(ring(8, {}, {(2, 3): 200.0}), 8)
    assert set(found) == {"n2", "n3"} and found["n2"][0] is Verdict.warned
    assert "mlx5_0 between n2 and n3: 200 Gb/s" in found["n3"][1]


def test_sound_ones_pass_with_their_rates() -> None:
    assert judged(ring(512, {}, {}), 512) == {}


def test_what_has_no_rate_does_not_pass(config: Config) -> None:
    links = ring(3, {}, {})
    links[0] = RawLink(card="mlx5_0", pair=links[0].pair, gbps=Missing(reason="timed out"), rate_gbps=400.0)
    assert {own for own, _ in judged(links, 3).values()} == {Verdict.skipped}
    assert "no rate of mlx5_0: timed out" in judged(links, 3)["n0"][1]

    def reason(*measured: RankMeasurements) -> str:
        names = {rank: f"n{rank}" for rank in range(len(measured))}
        (finding,) = [
            one
            for one in judge_measurements(dict(enumerate(measured)), names, config)["n0"]
            if one.check == "raw RDMA rates"
        ]
        assert finding.verdict is Verdict.skipped
        return finding.found

    absent = RankMeasurements(raw_rates=Missing(reason="ib_write_bw is not installed: install perftest"))
    assert "install perftest" in reason(absent, absent)
    assert reason(RankMeasurements(raw_rates=[]), absent) == "no other node of its pairs has it"
    assert reason(RankMeasurements()) == "there is no other node"
    assert reason(RankMeasurements(), RankMeasurements()) == "measuring broke off earlier"
