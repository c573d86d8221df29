"""Each fault of a node is named by one check, with what it is and what to do."""

import pytest

from k25_train.config.schema import Config
from launch.preflight.system import AbsentError, BrokenError
from tests.helpers.node_faults import BAD, SKIPPED, SO_SO, Fault, assert_named, gpu, says, set_value, write
from tests.helpers.recorded_node import CARD, GIB, LIMITS, MEMINFO, PORT, RecordedNode, change_output

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
    Fault("few lanes", gpu(6, pcie__link__width__current="8"), "GPU PCIe link", BAD, ("lanes 8 of 16",)),
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
        change_output("nvidia-smi topo", "GPU1\tNV8", "GPU1\tNODE"),
        "NVLink",
        BAD,
        ("GPU 1 to 0 NODE", "fabricmanager"),
    ),
    Fault(
        "far card",
        change_output("nvidia-smi topo", "\tPIX\tSYS", "\tNODE\tSYS"),
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
        change_output(
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
        change_output("mlnx_qos", "state: dscp", "state: pcp"),
        "traffic class",
        BAD,
        ("takes the priority from pcp",),
    ),
    Fault(
        "no mlnx_qos",
        says("mlnx_qos", AbsentError("mlnx_qos is not installed")),
        "traffic class",
        SKIPPED,
        ("neither mlnx_qos nor dcb is installed", "mlnx-tools", "iproute2"),
    ),
    Fault(
        "no trust state",
        change_output("mlnx_qos", "state: dscp", "state: none"),
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
        ("39,000.0 GiB free", "40,000.0 GiB", "checkpoint.keep + 1"),
    ),
    Fault(
        "no room for unsound checkpoints",
        set_value("free_bytes", 59_000 * GIB),
        "disk of the run",
        SO_SO,
        ("59,000.0 GiB free", "60,000.0 GiB", "checkpoint.keep + 3"),
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
    assert_named(fault, recorded, config)
