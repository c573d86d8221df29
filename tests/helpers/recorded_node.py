"""A node of eight GPUs and eight RoCE cards recorded in a folder and in texts, for checks to read.

Formats follow the kernel's sysfs and the tools nvidia-smi, mlnx_qos and ethtool; values are made up. A test
changes what it wants broken: a file with `write`, a GPU's field with `gpus`, a command with `outputs`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.fabric import environment
from launch.preflight.findings import Finding
from launch.preflight.node import judge_node, read_after_load, read_node, read_under_load
from launch.preflight.system import AbsentError, Build, System, Usage
from tests.helpers.project_sources import REPO
from tests.helpers.recorded_cards import RecordedCards

CARD = "sys/class/infiniband/mlx5_2"
"""Folder of one of the cards."""
PORT = f"{CARD}/ports/1"
CHECKPOINT_BYTES = 10_000 * 2**30
"""Size of a checkpoint; the node's disk has room for many."""
GOLDEN = REPO / "tests" / "golden" / "preflight"
GIB = 2**30
GPU = {
    "name": "NVIDIA H800",
    "driver_version": "580.95.05",
    "memory.total": "81559",
    "mig.mode.current": "Disabled",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "utilization.gpu": "100",
    "clocks.current.sm": "1410",
    "clocks.max.sm": "1980",
    "pcie.link.gen.current": "5",
    "pcie.link.gen.max": "5",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
    "clocks_event_reasons.active": "0x0000000000000004",
    "remapped_rows.pending": "0",
    "remapped_rows.failure": "0",
}
MEMINFO = "MemTotal:       {total} kB\nMemFree:        1024 kB\nMemAvailable:   {available} kB\n"
LIMITS = "Limit                     Soft Limit           Hard Limit           Units     \n"
LIMITS += "Max core file size        0                    unlimited            bytes     \n"
LIMITS += "Max processes             8254000              8254000              processes \n"
LIMITS += "Max open files            1048576              1048576              files     \n"
LIMITS += "Max locked memory         {limit}            {limit}            bytes     \n"
NVSMI_LOG = """
==============NVSMI LOG==============

Timestamp                                 : Sat Nov 28 08:00:12 2026
Driver Version                            : 580.95.05
CUDA Version                              : 13.0

Attached GPUs                             : 8
"""
NVRM = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"


@cache
def fabric_variables() -> dict[str, str]:
    """What launch.slurm and launch.torchrun set for the report's job."""
    config = compose(["experiment=k25_pretrain_4k"])
    return {variable.name: variable.value for variable in environment(config)}


class RecordedNode(RecordedCards):
    """A recorded node, read through `system`; sound unless changed."""

    def __init__(self, root: Path, num_gpus: int = 8) -> None:
        super().__init__(root)
        self.gpus = [
            GPU | {"index": str(i), "pci.bus_id": f"00000000:{0x18 + i:02X}:00.0"} for i in range(num_gpus)
        ]
        self.outputs: dict[str, str | Exception | Callable[[], str]] = {
            "nvidia-smi topo": (GOLDEN / "nvidia_smi_topo.txt").read_text(),
            "mlnx_qos": (GOLDEN / "mlnx_qos.txt").read_text(),
            "ethtool --show-fec": (GOLDEN / "ethtool_fec.txt").read_text(),
            "ethtool -S": (GOLDEN / "ethtool_statistics.txt").read_text(),
            "mlxlink": (GOLDEN / "mlxlink.json").read_text(),
            "nvidia-smi -q": smi_log([gpu["pci.bus_id"] for gpu in self.gpus]),
            "nvidia-smi nvlink --status": nvlink_report("26.562 GB/s", num_gpus),
            "nvidia-smi nvlink --errorcounters": nvlink_report(
                ("Replay Errors: 0", "Recovery Errors: 0", "CRC Errors: 0"), num_gpus
            ),
            "dmesg": (GOLDEN / "dmesg.txt").read_text(),
            "chronyc": (GOLDEN / "chronyc_tracking.txt").read_text(),
        }
        self.answer: Callable[[Sequence[str]], str] = self._run
        self.environment = {"RANK": "0", "NCCL_VERSION": "2.29.7", "PATH": "/usr/bin"}
        self.environment |= fabric_variables()
        self.address: str | None = "10.0.0.1"
        self.host = "node-1"
        self.known_names = {"node-1": ["10.0.0.1"], "node-0": ["10.0.0.10"]}
        self.known_addresses = {"10.0.0.1": "node-1.example.org"}
        self.packages = Build(cuda="13.0", nccl={"nvidia-nccl-cu13": "2.29.7"}, nvshmem="3.4.5", deep_ep=None)
        self.free_bytes = 100_000 * GIB
        self.shm_bytes = 64 * GIB
        self.write("proc/meminfo", MEMINFO.format(total=2113 * 10**6, available=2090 * 10**6))
        self.write("proc/self/limits", LIMITS.format(limit="unlimited"))
        self.write("proc/sys/kernel/osrelease", "6.8.0-60-generic\n")
        self.write("proc/uptime", f"{30 * 86400}.25 9999999.00\n")
        self.write("sys/module/nvidia_peermem/version", "580.95.05\n")
        self.write("sys/class/net/bond0/operstate", "up\n")
        self.write("sys/class/net/bond0/mtu", "1500\n")
        for number in range(8):
            self.write_card(number)
        self.write_machine()
        bridges = [self.write_gpu(number) for number in range(num_gpus)]
        self.outputs["lspci"] = "".join(bridges)

    def write_machine(self) -> None:
        """Settings of the kernel."""
        self.write("proc/mounts", "tmpfs /dev/shm tmpfs rw,nosuid,nodev 0 0\n")
        self.write("proc/cmdline", "BOOT_IMAGE=/vmlinuz-6.8.0-60-generic root=/dev/md0 ro iommu=pt\n")
        cpu = "model name\t: Intel(R) Xeon(R) Platinum 8468\nflags\t\t: fpu vme de\n"
        self.write("proc/cpuinfo", "".join(f"processor\t: {number}\n{cpu}\n" for number in range(2)))
        self.write("proc/self/status", "Cpus_allowed_list:\t0-95\nMems_allowed_list:\t0-1\n")
        self.write("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n")
        self.write("proc/sys/kernel/numa_balancing", "0\n")
        self.write("proc/sys/kernel/pid_max", "4194304\n")
        self.write("proc/sys/kernel/core_pattern", "|/usr/share/apport/apport -p%p -s%s\n")
        self.write("proc/self/cgroup", "0::/system.slice/slurmstepd.scope/job_7\n")
        self.write("sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/pids.max", "max\n")
        self.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
        self.write(
            "sys/kernel/mm/transparent_hugepage/defrag", "always defer defer+madvise [madvise] never\n"
        )
        for node in range(2):
            cpus = f"{48 * node}-{48 * node + 47}"
            self.write(f"sys/devices/system/node/node{node}/cpulist", f"{cpus}\n")
            self.write(f"sys/devices/system/cpu/cpu{node}/cpufreq/scaling_governor", "performance\n")
        self.write("sys/class/iommu/dmar0/name", "dmar0\n")
        self.write("proc/driver/nvidia/version", NVRM)

    def write_gpu(self, number: int) -> str:
        """A GPU behind a port of the CPU, a switch and its port; returns lspci's text of these three."""
        domain = f"sys/devices/pci0000:{0x10 + number:02x}"
        bridges = [
            f"0000:{0x10 + number:02x}:01.0",
            f"0000:{0x40 + number:02x}:00.0",
            f"0000:{0x50 + number:02x}:02.0",
        ]
        device = f"0000:{0x18 + number:02x}:00.0"
        folder = "/".join((domain, *bridges, device))
        self.write(f"{folder}/iommu_group/type", "identity\n")
        self.write(f"{folder}/numa_node", f"{number // 4}\n")
        devices = self.root / "sys/bus/pci/devices"
        devices.mkdir(parents=True, exist_ok=True)
        for kind, name in (("correctable", "COR"), ("nonfatal", "NONFATAL"), ("fatal", "FATAL")):
            self.write(f"{folder}/aer_dev_{kind}", f"Undefined 0\nTOTAL_ERR_{name} 0\n")
        (devices / device).symlink_to(self.root / folder)
        text = (GOLDEN / "lspci_bridge.txt").read_text()
        return "".join(text.format(address=address) for address in bridges)

    @property
    def system(self) -> System:
        """Access to this node, as for a real one."""
        return System(
            root=self.root,
            run=self.answer,
            usage=self._usage,
            environment=self.environment,
            resolve=lambda: self.address,
            host=lambda: self.host,
            lookup=lambda name: self.known_names.get(name, []),
            reverse=self.known_addresses.get,
            build=lambda: self.packages,
        )

    def _usage(self, path: Path) -> Usage:
        size = self.shm_bytes if str(path) == "/dev/shm" else self.free_bytes
        return Usage(total_bytes=size, free_bytes=size)

    def _run(self, words: Sequence[str]) -> str:
        line = " ".join(words)
        for start, output in self.outputs.items():
            if line.startswith(start):
                if isinstance(output, Exception):
                    raise output
                return output if isinstance(output, str) else output()
        if words[0] == "nvidia-smi":
            return self._query(words[1])
        raise AbsentError(f"{words[0]} is not installed")

    def _query(self, query: str) -> str:
        fields = query.partition("=")[2].split(",")
        # Queries of remapped rows name the bus differently.
        rows = [gpu | {"gpu_bus_id": gpu["pci.bus_id"]} for gpu in self.gpus]
        return "".join(", ".join(row[field] for field in fields) + "\n" for row in rows)


def smi_log(bus_ids: Sequence[str]) -> str:
    """What `nvidia-smi -q` prints of GPUs."""
    block = (GOLDEN / "nvidia_smi_q.txt").read_text()
    return NVSMI_LOG + "".join(f"GPU {bus_id}\n{block}\n" for bus_id in bus_ids)


def nvlink_report(lines: str | Sequence[str], num_gpus: int) -> str:
    """What `nvidia-smi nvlink` prints of GPUs with eight links, with `lines` for each."""
    own = [lines] if isinstance(lines, str) else lines
    links = "".join(f"\t Link {link}: {line}\n" for link in range(8) for line in own)
    return "".join(
        f"GPU {number}: NVIDIA H800 (UUID: GPU-0000000{number}-0000-0000-0000-000000000000)\n{links}"
        for number in range(num_gpus)
    )


def examine(
    recorded: RecordedNode, config: Config, meanwhile: Callable[[], None] = lambda: None
) -> list[Finding]:
    """All findings on a node; `meanwhile` is called between its two readings, in place of measurements."""
    node = read_node(recorded.system, "node-1", config)
    read_under_load(recorded.system, node)
    meanwhile()
    read_after_load(recorded.system, node, config)
    return judge_node(node, config, CHECKPOINT_BYTES)


def change_output(start: str, old: str, new: str) -> Callable[[RecordedNode], object]:
    """A function that changes what a command of the node prints."""

    def change(node: RecordedNode) -> None:
        text = node.outputs[start]
        assert isinstance(text, str)
        assert old in text
        node.outputs[start] = text.replace(old, new)

    return change
