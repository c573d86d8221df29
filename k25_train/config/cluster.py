"""The machines of a job, their scheduler and network. Facts about a cluster are in `conf/cluster/` only.

Paths and names go into `#SBATCH` lines, which have no quotes that every version of SLURM agrees on, so
characters that SLURM could misread are refused here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import not_negative
from parallel.config import Problem, not_positive

DETECT = "detect"
"""Value of `gid_index` with which NCCL finds the index of each HCA itself."""
SAFE_NAME = re.compile(r"[\w@+=:,./~-]+", re.ASCII)
"""Text that SLURM reads literally, in a `#SBATCH` line and in an option of srun."""


class Device(Enum):
    """Kind of device that tensors are on."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass(slots=True, kw_only=True)
class SlurmConfig:
    """Resources that a job requests from SLURM, and how it recovers from faults."""

    partition: str | None
    """Queue of the nodes; null is the cluster's default."""
    account: str | None
    """Account that is charged; null is the user's default."""
    qos: str | None
    """Quality of service; null is the account's default."""
    time_limit_min: int
    """Minutes until SLURM ends a job; the run continues in the next one."""
    stop_before_end_s: int
    """Seconds before the time limit, or before a preemption, at which ranks are asked to save and stop;
    longer than a step and a checkpoint take."""
    spare_nodes: int
    """Machines beyond `cluster.nodes` that wait in the job to replace failed ones."""
    min_nodes: int | None
    """Fewest machines on which the run continues after failures, with fewer replicas and the same global
    batch; null is `cluster.nodes`."""
    restart_wait_s: float
    """Seconds before the first restart after a failure, doubled with each further one: at least as long as
    SLURM takes to notice a lost node (SlurmdTimeout)."""
    preflight: bool
    """Whether nodes and fabric are checked (`launch.preflight`) before every start of the ranks, in a few
    minutes, and nodes that fail are left out."""
    rendezvous_port: int
    """First of the 100 TCP ports of which the first node takes one that is free."""
    python: str | None
    """Python of the nodes that runs the supervision and, without a container, the ranks; null is the one that
    submits."""
    container_image: str | None
    """Image for pyxis: a squashfs file or a reference such as `docker://…`; null runs on the bare node."""
    container_mounts: list[str]
    """Folders mounted into the container, as `SOURCE:TARGET`, in addition to the checkout, the run folder and
    the data."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("time_limit_min", "stop_before_end_s"))
        found += not_negative(self, ("spare_nodes", "restart_wait_s"))
        if not found and self.stop_before_end_s >= 60 * self.time_limit_min:
            rule = f"must be shorter than the job, time_limit_min ({self.time_limit_min} min)"
            remedy = "leave time for training before the job has to stop"
            found.append(Problem("stop_before_end_s", self.stop_before_end_s, rule, remedy))
        elif self.stop_before_end_s > 65535:
            rule = "must be at most 65535, as SLURM takes no more"
            found.append(Problem("stop_before_end_s", self.stop_before_end_s, rule, "900 is 15 minutes"))
        if not 1024 <= self.rendezvous_port <= 65435:
            rule = "must leave 100 ports that users may open, so lie within 1024 to 65435"
            found.append(Problem("rendezvous_port", self.rendezvous_port, rule, "e.g. 29500"))
        names = ("partition", "account", "qos", "python", "container_image")
        found += misread((name, getattr(self, name)) for name in names)
        found += misread((f"container_mounts.{i}", mount) for i, mount in enumerate(self.container_mounts))
        return found


@dataclass(slots=True, kw_only=True)
class FabricConfig:
    """The network between GPUs: RDMA over converged Ethernet. NCCL's variables follow from it."""

    interface: str
    """Network interface, the same on every node, over which ranks find each other and gloo talks."""
    hcas: list[str]
    """RDMA devices that carry training, one per GPU; storage and management devices are left out."""
    gid_index: int | str
    """Row of each device's GID table that holds its RoCEv2 address, or `detect`: then NCCL searches it for
    every device, as rows differ between nodes and change when addresses do."""
    traffic_class: int
    """Traffic class of packets, 0 to 255: the DSCP times 4 of the switches' lossless queue."""
    ack_timeout: int
    """Local ACK timeout exponent, 1 to 31: a packet is sent again after 4.096 us x 2^n."""
    retries: int
    """Times a packet is sent again before the connection fails, 0 to 7."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = misread((name, getattr(self, name)) for name in ("interface", "gid_index"))
        found += misread((f"hcas.{i}", hca) for i, hca in enumerate(self.hcas))
        if not self.hcas:
            found.append(
                Problem("hcas", "[]", "must name a device", "list those of `ibv_devices`, one per GPU")
            )
        is_row = isinstance(self.gid_index, int) and 0 <= self.gid_index <= 255
        if not is_row and self.gid_index != DETECT:
            rule = f"must be a row of the GID table, 0 to 255, or {DETECT}"
            found.append(Problem("gid_index", self.gid_index, rule, "`show_gids` lists RoCEv2 rows"))
        limits = (("traffic_class", 0, 255), ("ack_timeout", 1, 31), ("retries", 0, 7))
        for name, least, most in limits:
            number = getattr(self, name)
            if not least <= number <= most:
                rule = f"must lie within {least} to {most}"
                found.append(Problem(name, number, rule, "ask who runs the switches"))
        return found


@dataclass(slots=True, kw_only=True)
class ClusterConfig:
    """Machines of the job, with the rates that plans assume."""

    name: str
    """Name of the cluster in logs and tables."""
    device: Device
    """Kind of device that tensors are on."""
    nodes: int
    """Machines of the job."""
    gpus_per_node: int
    """Ranks per machine: its GPUs, or processes where the device is the CPU."""
    model_tflops: float
    """Model FLOPs that a rank computes in a second while it trains, in units of 1e12. Only its
    ratio to the two rates below matters, to plans of what runs when (`dep.schedule=bubbles`)."""
    network_gb_per_s: float
    """Bytes that a rank sends in a second, in units of 1e9."""
    host_copy_gb_per_s: float
    """Bytes that a rank copies from host memory to its device in a second, in units of 1e9."""
    gpu_memory_gb: float | None
    """Memory of a GPU, in units of 1e9 bytes; null where the device is the CPU."""
    host_memory_gib: float
    """Host memory of a machine."""
    slurm: SlurmConfig | None
    """Scheduler; null where jobs are started by hand."""
    fabric: FabricConfig | None
    """Network between GPUs; null where there is none to set up."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        rates = ("model_tflops", "network_gb_per_s", "host_copy_gb_per_s", "host_memory_gib")
        found = not_positive(self, ("nodes", "gpus_per_node", *rates))
        # It is a comment of the submitted script, which a line break would end.
        found += misread([("name", self.name)])
        if self.gpu_memory_gb is not None:
            found += not_positive(self, ("gpu_memory_gb",))
        elif self.device is Device.cuda:
            rule = "must be given where cluster.device is cuda"
            found.append(Problem("gpu_memory_gb", None, rule, "use what the data sheet says, e.g. 80"))
        if self.slurm is not None:
            found += [problem.under("slurm") for problem in self.slurm.problems()]
            least = self.slurm.min_nodes
            if least is not None and not 1 <= least <= self.nodes:
                rule = f"must lie within 1 to cluster.nodes ({self.nodes})"
                remedy = "use null, which never continues with fewer"
                found.append(Problem("slurm.min_nodes", least, rule, remedy))
        if self.fabric is not None:
            found += [problem.under("fabric") for problem in self.fabric.problems()]
        return found


def misread(values: Iterable[tuple[str, object]]) -> list[Problem]:
    """Problems of the named values that a `#SBATCH` line or an option could not carry as they are."""
    return [
        Problem(
            name,
            repr(value),
            "must consist of letters, digits and @+=:,./~-_ only: SLURM and NCCL know no quotes",
            "rename it, or link to it by another path",
        )
        for name, value in values
        if isinstance(value, str) and not SAFE_NAME.fullmatch(value)
    ]
