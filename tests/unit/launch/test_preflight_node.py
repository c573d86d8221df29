"""What preflight says of a node: nothing bad of a sound one, and of each fault what it is and what to do."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Finding, Verdict, worst
from launch.preflight.hcas import read_hcas
from launch.preflight.lossless import MANY_LOST, judge_growth
from launch.preflight.node import Node, judge_node, read_after_load, read_node, read_under_load
from launch.preflight.system import AbsentError, BrokenError
from tests.helpers.recorded_node import GIB, LIMITS, MEMINFO, RecordedNode

CARD = "sys/class/infiniband/mlx5_2"
PORT = f"{CARD}/ports/1"
RUN_BYTES = 40_000 * GIB


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["experiment=k25_pretrain_4k"])


@pytest.fixture
def recorded(tmp_path: Path) -> RecordedNode:
    return RecordedNode(tmp_path)


def examine(
    recorded: RecordedNode, config: Config, meanwhile: Callable[[], None] = lambda: None
) -> list[Finding]:
    """All findings; `meanwhile` happens while the node is measured."""
    node = read_node(recorded.system, "node-1", config)
    read_under_load(recorded.system, node)
    meanwhile()
    read_after_load(recorded.system, node, config)
    return judge_node(node, config, RUN_BYTES)


def test_a_sound_node_passes_every_check(recorded: RecordedNode, config: Config) -> None:
    findings = examine(recorded, config)
    assert {finding.verdict for finding in findings} == {Verdict.passed}, "\n".join(map(str, findings))
    found = {finding.check: finding.found for finding in findings}
    assert found["GPU count"] == "8 x NVIDIA H800"
    assert found["NVLink"] == "NV8 between all GPUs"
    assert found["GPU to network card"] == "all 8 GPUs have one by PIX or PXB"
    assert found["network speed"] == "8 cards of 400 Gb/s, 400 GB/s per node"
    assert found["RoCE v2 GID"].startswith("mlx5_0: 3 (10.10.0.5), mlx5_1: 3 (10.10.1.5)")
    assert found["traffic class"] == "106 is DSCP 26, on lossless priority 3"
    assert found["PFC and loss counters"] == "no loss, 0 pause frames while measuring"


def test_every_check_speaks_on_a_node_without_gpus_and_rdma(tmp_path: Path, config: Config) -> None:
    """The names are the same as on a sound node, each judged or skipped with a reason."""
    checks = [finding.check for finding in examine(RecordedNode(tmp_path / "sound"), config)]
    bare = RecordedNode(tmp_path / "bare", num_gpus=0)
    bare.outputs, bare.environment = {}, {}
    local = compose(["experiment=smoke"])
    findings = judge_node(read_node(bare.system, "laptop", local), local, run_bytes=GIB)
    assert sorted(finding.check for finding in findings) == sorted(checks)
    by_check = {finding.check: finding for finding in findings}
    assert by_check["GPU count"].verdict is Verdict.skipped
    assert by_check["GPU count"].found == "cluster local computes on CPUs (cluster.device is cpu)"
    assert by_check["RoCE v2 GID"].found == "cluster local has no RDMA fabric (cluster.fabric is null)"
    assert worst(findings) is Verdict.passed


@dataclass(frozen=True)
class Fault:
    """Something wrong with a node, and what has to be said of it."""

    name: str
    do: Callable[[RecordedNode], object]
    check: str
    verdict: Verdict
    words: tuple[str, ...]


def gpu(index: int, **fields: str) -> Callable[[RecordedNode], object]:
    """Change fields of a GPU; `_` stands for a dot, as dots cannot be in names of arguments."""
    return lambda node: node.gpus[index].update(
        {key.replace("__", "."): value for key, value in fields.items()}
    )


def write(path: str, text: str) -> Callable[[RecordedNode], object]:
    return lambda node: node.write(path, text)


def output(start: str, old: str, new: str) -> Callable[[RecordedNode], object]:
    """Change what a command prints."""

    def change(node: RecordedNode) -> None:
        text = node.outputs[start]
        assert isinstance(text, str)
        assert old in text
        node.outputs[start] = text.replace(old, new)

    return change


def says(start: str, error: Exception) -> Callable[[RecordedNode], object]:
    return lambda node: node.outputs.update({start: error})


def set_value(name: str, value: int) -> Callable[[RecordedNode], object]:
    return lambda node: setattr(node, name, value)


BAD, SO_SO, SKIPPED = Verdict.failed, Verdict.warned, Verdict.skipped
NO_DRIVER = BrokenError("nvidia-smi --query: status 9: NVIDIA-SMI has failed")
FAULTS = [
    Fault(
        "GPU lost",
        lambda node: node.gpus.pop(),
        "GPU count",
        BAD,
        ("7 x NVIDIA H800", "gpus_per_node is 8", "Xid"),
    ),
    Fault("odd GPU", gpu(3, name="NVIDIA H20"), "GPU count", BAD, ("7 x NVIDIA H800 + 1 x NVIDIA H20",)),
    Fault("no driver", says("nvidia-smi", NO_DRIVER), "GPU count", BAD, ("NVIDIA-SMI has failed",)),
    Fault(
        "no nvidia-smi",
        says("nvidia-smi", AbsentError("nvidia-smi is not installed")),
        "GPU count",
        BAD,
        ("nvidia-smi is not installed",),
    ),
    Fault(
        "memory error",
        gpu(4, ecc__errors__uncorrected__volatile__total="2"),
        "GPU memory errors",
        BAD,
        ("{4: 2}", "--gpu-reset"),
    ),
    Fault(
        "row waits",
        gpu(1, remapped_rows__pending="Yes"),
        "GPU memory errors",
        BAD,
        ("GPUs [1]", "--gpu-reset"),
    ),
    Fault(
        "no spare row", gpu(1, remapped_rows__failure="1"), "GPU memory errors", BAD, ("GPUs [1]", "replace")
    ),
    Fault(
        "ECC off",
        gpu(0, ecc__mode__current="Disabled"),
        "GPU memory errors",
        SO_SO,
        ("ECC is off on GPUs [0]",),
    ),
    Fault("no ECC", gpu(0, ecc__mode__current="[N/A]"), "GPU memory errors", SKIPPED, ("GPUs [0]",)),
    Fault(
        "GPU hangs",
        gpu(
            3,
            memory__total="0",
            mig__mode__current="[GPU requires reset]",
            ecc__mode__current="[GPU requires reset]",
            ecc__errors__uncorrected__volatile__total="[GPU requires reset]",
            clocks_event_reasons__active="[GPU requires reset]",
        ),
        "GPU count",
        BAD,
        ("8 x NVIDIA H800", "GPUs [3] are lost or require a reset", "--gpu-reset"),
    ),
    Fault("few lanes", gpu(6, pcie__link__width__current="8"), "GPU PCIe lanes", BAD, ("GPU 6: 8 of 16",)),
    Fault("MIG", gpu(2, mig__mode__current="Enabled"), "GPU modes", BAD, ("MIG is on for GPUs [2]",)),
    Fault(
        "hot",
        gpu(5, clocks_event_reasons__active="0x0000000000000040"),
        "GPU throttling",
        BAD,
        ("GPU 5: hardware thermal slowdown",),
    ),
    Fault(
        "warm",
        gpu(5, clocks_event_reasons__active="0x0000000000000020"),
        "GPU throttling",
        SO_SO,
        ("GPU 5: software thermal",),
    ),
    Fault(
        "NVLink down",
        output("nvidia-smi topo", "GPU1\tNV8", "GPU1\tNODE"),
        "NVLink",
        BAD,
        ("GPU 1 to 0 NODE", "fabricmanager"),
    ),
    Fault(
        "far card",
        output("nvidia-smi topo", "\tPIX\tSYS", "\tNODE\tSYS"),
        "GPU to network card",
        SO_SO,
        ("GPU 3: nearest is mlx5_0 by NODE",),
    ),
    Fault(
        "card down",
        write(f"{PORT}/state", "1: DOWN\n"),
        "network cards",
        BAD,
        ("mlx5_2 is DOWN", "switch port"),
    ),
    Fault(
        "slow link",
        write(f"{PORT}/rate", "200 Gb/sec (4X HDR)\n"),
        "network speed",
        BAD,
        ("200 and 400 Gb/s", "port of mlx5_2"),
    ),
    Fault("odd MTU", write("sys/class/net/eth2/mtu", "1500\n"), "network MTU", BAD, ("1500 and 9000 bytes",)),
    Fault(
        "v1 only",
        lambda node: node.write_gid(2, 3, "0000:0000:0000:0000:0000:ffff:0a0a:0205", "IB/RoCE v1"),
        "RoCE v2 GID",
        BAD,
        ("none on mlx5_2", "IPv4"),
    ),
    Fault(
        "TC forced",
        write(f"{CARD}/tc/1/traffic_class", "Global tclass=0\n"),
        "traffic class",
        BAD,
        ("{'mlx5_2': 0}", "tclass=106"),
    ),
    Fault(
        "wrong priority",
        output(
            "mlnx_qos",
            "0   0   0   1   0   0   0   0   \n\tbuffer",
            "0   0   0   0   0   1   0   0   \n\tbuffer",
        ),
        "traffic class",
        BAD,
        ("on priority 3", "flow control is on [5]"),
    ),
    Fault(
        "trusts VLAN",
        output("mlnx_qos", "state: dscp", "state: pcp"),
        "traffic class",
        BAD,
        ("takes the priority from pcp",),
    ),
    Fault(
        "no mlnx_qos",
        says("mlnx_qos", AbsentError("mlnx_qos is not installed")),
        "traffic class",
        SKIPPED,
        ("mlnx_qos is not installed",),
    ),
    Fault(
        "no trust state",
        output("mlnx_qos", "state: dscp", "state: none"),
        "traffic class",
        SKIPPED,
        ("no trust state",),
    ),
    Fault(
        "memlock",
        write("proc/self/limits", LIMITS.format(limit="8388608")),
        "pinned memory",
        BAD,
        ("8,388,608 bytes", "LimitMEMLOCK"),
    ),
    Fault(
        "interface down",
        write("sys/class/net/bond0/operstate", "down\n"),
        "interface",
        BAD,
        ("bond0 is not", "eth0"),
    ),
    Fault(
        "module lost",
        write("proc/meminfo", MEMINFO.format(total=10**9, available=10**9)),
        "host memory",
        BAD,
        ("954 GiB", "host_memory_gib is 2000"),
    ),
    Fault(
        "memory in use",
        write("proc/meminfo", MEMINFO.format(total=2113 * 10**6, available=10**9)),
        "host memory",
        SO_SO,
        ("954 available",),
    ),
    Fault(
        "disk full",
        set_value("free_bytes", 39_000 * GIB),
        "disk of the run",
        BAD,
        ("39,000.0 GiB free", "40,000.0 GiB", "checkpoint.keep"),
    ),
    Fault("small shm", set_value("shm_bytes", 64 * 2**20), "/dev/shm", BAD, ("0.06 GiB", "--shm-size")),
    Fault(
        "variable unset",
        lambda node: node.environment.pop("NCCL_IB_TC"),
        "variables",
        SO_SO,
        ("NCCL_IB_TC is not set, not 106", "launch.torchrun"),
    ),
    Fault(
        "pasted variable",
        lambda node: node.environment.update({"NCCL_P2P_DISABLE": "1"}),
        "variables",
        SO_SO,
        ("NCCL_P2P_DISABLE=1 is set", "unset"),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Fault, recorded: RecordedNode, config: Config) -> None:
    fault.do(recorded)
    findings = [finding for finding in examine(recorded, config) if finding.verdict is not Verdict.passed]
    texts = "\n".join(map(str, findings))
    bad = [finding for finding in findings if finding.check == fault.check]
    assert bad, texts
    assert bad[0].verdict is fault.verdict, texts
    for word in fault.words:
        assert word in str(bad[0])
    if bad[0].verdict is not Verdict.skipped:
        assert bad[0].rule
        assert bad[0].remedy
    # One fault, one check: a second bad one would send people after what is not broken.
    assert {finding.check for finding in findings if finding.verdict is not Verdict.skipped} <= {
        fault.check
    }, texts


def test_checkpoints_that_the_run_has_need_no_more_room(recorded: RecordedNode, config: Config) -> None:
    """Else no run whose disk holds just its checkpoints could be started again after a fault."""
    recorded.free_bytes = 15_000 * GIB
    folder = Path(config.run.dir).absolute().relative_to("/")
    for step in (100, 200):
        recorded.write(f"{folder}/checkpoints/step_{step}/rank_0.pt", "")
        os.truncate(recorded.root / folder / f"checkpoints/step_{step}/rank_0.pt", 13_000 * GIB)
    (finding,) = [one for one in examine(recorded, config) if one.check == "disk of the run"]
    assert finding.verdict is Verdict.passed
    assert (
        "15,000.0 GiB free at " in finding.found and "26,000.0 GiB used by its checkpoints" in finding.found
    )


def test_counters_that_grow_while_measuring(recorded: RecordedNode, config: Config) -> None:
    def lose() -> None:
        recorded.write(f"{PORT}/hw_counters/packet_seq_err", "7\n")

    (finding,) = [one for one in examine(recorded, config, lose) if one.verdict is not Verdict.passed]
    assert finding.check == "PFC and loss counters"
    assert "mlx5_2 packet_seq_err +7" in finding.found


def test_rdma_counters_without_those_of_the_port(recorded: RecordedNode, config: Config) -> None:
    recorded.outputs["ethtool"] = BrokenError("ethtool -S net1: status 94: no stats available")

    def lose() -> None:
        recorded.write(f"{PORT}/hw_counters/packet_seq_err", "7\n")

    (finding,) = [one for one in examine(recorded, config, lose) if one.verdict is not Verdict.passed]
    assert (finding.verdict, finding.found) == (Verdict.warned, "mlx5_2 packet_seq_err +7")


@pytest.mark.parametrize(
    ("name", "count", "verdict"),
    [
        ("packet_seq_err", MANY_LOST - 1, Verdict.warned),
        ("packet_seq_err", MANY_LOST, Verdict.failed),
        ("link_downed", 1, Verdict.failed),
    ],
)
def test_a_few_lost_packets_warn_and_many_or_a_lost_link_fail(
    name: str, count: int, verdict: Verdict
) -> None:
    finding = judge_growth({"mlx5_0": {name: 5}}, {"mlx5_0": {name: 5 + count}})
    assert (finding.verdict, finding.found) == (verdict, f"mlx5_0 {name} +{count}")


@pytest.mark.parametrize("name", ["link_down_events_phy", "rx_prio3_buf_discard", "rx_prio3_cong_discard"])
def test_what_the_port_counts_while_measuring(recorded: RecordedNode, config: Config, name: str) -> None:
    """RDMA's own counters have no packets dropped for want of buffers, and link_downed ends at 255."""
    recorded.outputs["ethtool"] = f"{recorded.outputs['ethtool']}     {name}: 2\n"
    lose = output("ethtool", f"{name}: 2", f"{name}: 3")
    (finding,) = [
        one for one in examine(recorded, config, lambda: lose(recorded)) if one.verdict is not Verdict.passed
    ]
    assert finding.check == "PFC and loss counters"
    assert f"mlx5_0 {name} +1" in finding.found


def test_pauses_are_no_loss(recorded: RecordedNode, config: Config) -> None:
    """A full receiver pauses its sender; that is what the priority is for."""
    pause = output("ethtool", "rx_prio3_pause: 5120", "rx_prio3_pause: 5130")
    findings = examine(recorded, config, lambda: pause(recorded))
    (finding,) = [one for one in findings if one.check == "PFC and loss counters"]
    assert (finding.verdict, finding.found) == (Verdict.passed, "no loss, 80 pause frames while measuring")


@pytest.mark.parametrize(
    ("index", "verdict"), [(3, Verdict.passed), (1, Verdict.failed), (2, Verdict.failed)]
)
def test_a_fixed_gid_index_is_held_against_every_card(
    recorded: RecordedNode, index: int, verdict: Verdict
) -> None:
    """Rows 0 and 2 are RoCE v1, row 1 has a link-local address, which no switch routes."""
    config = compose(["experiment=k25_pretrain_4k", f"cluster.fabric.gid_index={index}"])
    (finding,) = [one for one in examine(recorded, config) if one.check == "RoCE v2 GID"]
    assert finding.verdict is verdict
    if verdict is Verdict.failed:
        assert f"cluster.fabric.gid_index is {index}" in finding.rule
        assert "mlx5_0: 3 (10.10.0.5)" in finding.found


@pytest.mark.parametrize(("index", "verdict"), [("3", Verdict.passed), ("detect", Verdict.failed)])
def test_a_fabric_of_ipv6_needs_a_fixed_gid_index(
    recorded: RecordedNode, index: str, verdict: Verdict
) -> None:
    """NCCL is told to search for IPv4 addresses only."""
    for number in range(8):
        for row, kind in ((2, "IB/RoCE v1"), (3, "RoCE v2")):
            recorded.write_gid(number, row, f"fd93:0016:d59a:0000:0000:0000:0a0a:{number:02x}05", kind)
    config = compose(["experiment=k25_pretrain_4k", f"cluster.fabric.gid_index={index}"])
    (finding,) = [one for one in examine(recorded, config) if one.check == "RoCE v2 GID"]
    assert finding.verdict is verdict
    assert finding.found.startswith("3 on all cards" if verdict is Verdict.passed else "none on mlx5_0")


@pytest.mark.parametrize("address", [None, "127.0.1.1"])
def test_a_name_that_stands_for_loopback(recorded: RecordedNode, address: str | None) -> None:
    """Debian writes the host's name next to 127.0.1.1: gloo would listen where no other node reaches it."""
    recorded.environment = {"RANK": "0", "GLOO_BY_HAND": "1"}
    config = compose(["experiment=smoke", "cluster.nodes=2", "cluster.gpus_per_node=2"])
    assert [one.verdict for one in examine(recorded, config) if one.check == "host name"] == [Verdict.passed]
    recorded.address = address
    (finding,) = [one for one in examine(recorded, config) if one.verdict is Verdict.warned]
    assert finding.check == "host name"
    assert f"resolves to {address or 'nothing'}" in finding.found
    assert "/etc/hosts" in finding.remedy


def test_packets_too_small_for_rdma(recorded: RecordedNode, config: Config) -> None:
    for number in range(8):
        recorded.write(f"sys/class/net/eth{number}/mtu", "1500\n")
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict, finding.found) == ("network MTU", Verdict.warned, "1500 bytes")
    assert "4200" in finding.rule


def test_cards_too_slow_for_the_plan(recorded: RecordedNode) -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.network_gb_per_s=60"])
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("network speed", Verdict.failed)
    assert "400 GB/s per node" in finding.found
    assert "the plan needs 480 GB/s" in finding.rule


def test_a_bonded_card_has_the_speed_of_its_ports(recorded: RecordedNode, config: Config) -> None:
    """The kernel shows 200 Gb/s for each, one port's rate, and all are needed."""
    for number in range(8):
        recorded.bond_card(number)
    findings = examine(recorded, config)
    assert {one.verdict for one in findings} == {Verdict.passed}, "\n".join(map(str, findings))
    (finding,) = [one for one in findings if one.check == "network speed"]
    assert finding.found == "8 cards of 400 Gb/s, 400 GB/s per node"


def test_a_port_of_a_bonded_card_is_down(recorded: RecordedNode, config: Config) -> None:
    for number in range(8):
        recorded.bond_card(number)
    recorded.write("sys/class/net/eth2b/speed", "-1\n")
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("network speed", Verdict.failed)
    assert "200 and 400 Gb/s" in finding.found
    assert "port of mlx5_2" in finding.remedy


def test_all_ports_of_a_bonded_card_are_looked_at(recorded: RecordedNode, config: Config) -> None:
    recorded.bond_card(2)
    texts = {start: str(recorded.outputs[start]) for start in ("mlnx_qos", "ethtool")}
    recorded.outputs = {
        "mlnx_qos -i eth2b": texts["mlnx_qos"].replace("state: dscp", "state: pcp"),
        "ethtool -S eth2b": texts["ethtool"],
        **recorded.outputs,
    }
    lose = output("ethtool -S eth2b", "rx_discards_phy: 0", "rx_discards_phy: 5")
    findings = examine(recorded, config, lambda: lose(recorded))
    found = {one.check: one.found for one in findings if one.verdict is not Verdict.passed}
    assert found == {
        "traffic class": "mlx5_2 eth2b takes the priority from pcp",
        "PFC and loss counters": "mlx5_2 rx_discards_phy +5",
    }


def test_cards_bonded_as_interfaces_only_stay_two(recorded: RecordedNode) -> None:
    """The bond then carries TCP; each card has its own RDMA traffic."""
    recorded.bond_card(2)
    recorded.write("sys/class/net/eth2b/device/infiniband/mlx5_9/fw_ver", "28.39.1002\n")
    assert [card.interfaces for card in read_hcas(recorded.system)][2] == ("eth2",)


@pytest.mark.parametrize("forced", ["", "Global tclass=106\n"])
def test_a_traffic_class_for_single_addresses_forces_none(
    recorded: RecordedNode, config: Config, forced: str
) -> None:
    """The driver lists such rules below the class that it forces upon all connections, or alone."""
    rules = "src_ip=10.9.0.5,dst_ip=10.9.0.0/24,tclass=160\ndst_ip=10.9.1.7/32,tclass=32\n"
    recorded.write(f"{CARD}/tc/1/traffic_class", forced + rules)
    findings = examine(recorded, config)
    assert {one.verdict for one in findings} == {Verdict.passed}, "\n".join(map(str, findings))


def test_a_card_split_for_virtual_machines(recorded: RecordedNode) -> None:
    """Its folder has an interface for the port of each function as well, under any name."""
    recorded.write(f"{CARD}/device/net/eth10/address", "5e:11:22:33:44:55\n")
    recorded.write("sys/class/net/eth10/phys_port_name", "pf0vf0\n")
    recorded.write("sys/class/net/eth2/phys_port_name", "p0\n")
    assert [card.interfaces for card in read_hcas(recorded.system)][2] == ("eth2",)


def test_a_container_with_an_interface_upon_the_card(recorded: RecordedNode, config: Config) -> None:
    """The card's own is the host's (Kubernetes with macvlan): its rows hold zeros, or nothing readable."""
    shutil.rmtree(recorded.root / CARD / "device/net")
    for row in range(4):
        recorded.write(f"{PORT}/gids/{row}", "0000:0000:0000:0000:0000:0000:0000:0000\n")
    recorded.write_gid(2, 5, "0000:0000:0000:0000:0000:ffff:0a0a:0205", "RoCE v2")
    recorded.write(f"{PORT}/gid_attrs/ndevs/5", "net1\n")
    recorded.write("sys/class/net/net1/mtu", "9000\n")
    findings = examine(recorded, config)
    assert {one.verdict for one in findings} == {Verdict.passed}, "\n".join(map(str, findings))


def test_a_card_that_is_not_there(recorded: RecordedNode) -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.fabric.hcas=[mlx5_0,mlx5_9]"])
    bad = [one for one in examine(recorded, config) if one.verdict is Verdict.failed]
    assert "no mlx5_9" in bad[0].found
    assert "the node has mlx5_0, mlx5_1" in bad[0].remedy


def test_output_of_another_form_is_reported(recorded: RecordedNode, config: Config) -> None:
    recorded.outputs["nvidia-smi --query-gpu"] = "0, NVIDIA H800\n"
    (finding, *_) = [one for one in examine(recorded, config) if one.verdict is Verdict.failed]
    assert "expected 10 values" in finding.found


def test_records_travel_between_ranks(recorded: RecordedNode, config: Config) -> None:
    import pickle

    node = read_node(recorded.system, "node-1", config)
    copy: Node = pickle.loads(pickle.dumps(node))
    assert copy == node
