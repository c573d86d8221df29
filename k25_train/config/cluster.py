"""The machines of a job, their scheduler and network. Facts about a cluster are in `conf/cluster/` only."""

import re
from dataclasses import dataclass
from enum import Enum

from k25_train.config.fabric import FabricConfig
from k25_train.config.forms import NAME, PRODUCT
from k25_train.config.kubernetes import KubernetesConfig
from k25_train.config.rates import RatesConfig
from k25_train.config.site import SiteVariable, secret_problems, variable_problems
from k25_train.config.slurm import SlurmConfig
from parallel.config import Problem, not_positive


class Device(Enum):
    """Kind of device that tensors are on."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass(slots=True, kw_only=True)
class GpuConfig:
    """The GPUs that a site says its nodes have; preflight compares them."""

    model: str
    """Words of the product's name as nvidia-smi has it, e.g. `H800` or `H100 NVL`."""
    power_limit_w: float | None
    """Power cap that each GPU should have at least; null compares with the GPU's default."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = PRODUCT.misfits([("model", self.model)])
        return found + ([] if self.power_limit_w is None else not_positive(self, ("power_limit_w",)))


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
    rates: RatesConfig
    """What plans assume of a device: `device=NAME` chooses another of `conf/device`."""
    network_gb_per_s: float
    """Bytes that a rank sends in a second, in units of 1e9."""
    host_copy_gb_per_s: float
    """Bytes that a rank copies from host memory to its device in a second, in units of 1e9."""
    gpu: GpuConfig | None
    """Product and power cap of the GPUs; null leaves both unchecked."""
    host_memory_gib: float
    """Host memory of a machine."""
    slurm: SlurmConfig | None
    """Scheduler; null where jobs are started by hand or by Kubernetes."""
    kubernetes: KubernetesConfig | None
    """Kubernetes, for `launch.kubernetes`; null where there is none."""
    fabric: FabricConfig | None
    """Network between GPUs; null where there is none to set up."""
    environment: dict[str, SiteVariable]
    """Environment variables that ranks get in addition to those that follow from this file; name -> value and
    reason. One that contradicts those is refused."""
    overrides: dict[str, SiteVariable]
    """Environment variables that replace what would follow from this file, for sites that know better."""
    secrets: dict[str, str]
    """Environment variables whose values are secret; name -> file that holds the value and that only its
    owner can read. The value is in no file of the run, no log and no command line."""

    @property
    def gpu_memory_gb(self) -> float | None:
        """Memory of a GPU, in units of 1e9 bytes; None where the device is the CPU."""
        return self.rates.memory_gb

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        rates = ("network_gb_per_s", "host_copy_gb_per_s", "host_memory_gib")
        found = not_positive(self, ("nodes", "gpus_per_node", *rates))
        # It is a comment of the submitted script, which a line break would end.
        found += NAME.misfits([("name", self.name)])
        found += [problem.under("rates") for problem in self.rates.problems()]
        if self.gpu_memory_gb is None and self.device is Device.cuda:
            rule = "must be given where cluster.device is cuda"
            remedy = "use what torch finds, e.g. 84.9 on a card of 80 GB"
            found.append(Problem("rates.memory_gb", None, rule, remedy))
        if self.gpu is not None:
            found += [problem.under("gpu") for problem in self.gpu.problems()]
            if self.device is not Device.cuda:
                rule = f"is for GPUs, but cluster.device is {self.device.value}"
                found.append(Problem("gpu", self.gpu.model, rule, "use null, or correct cluster.device"))
        if self.slurm is not None:
            found += [problem.under("slurm") for problem in self.slurm.problems()]
            least = self.slurm.min_nodes
            if least is not None and not 1 <= least <= self.nodes:
                rule = f"must lie within 1 to cluster.nodes ({self.nodes})"
                remedy = "use null, which never continues with fewer"
                found.append(Problem("slurm.min_nodes", least, rule, remedy))
            gpus = gpus_in(self.slurm.gres)
            if self.device is Device.cuda and gpus is not None and gpus != self.gpus_per_node:
                rule = f"must have as many GPUs as cluster.gpus_per_node ({self.gpus_per_node})"
                found.append(Problem("slurm.gres", self.slurm.gres, rule, "correct one of them"))
        if self.kubernetes is not None:
            found += [problem.under("kubernetes") for problem in self.kubernetes.problems()]
        if self.fabric is not None:
            found += [problem.under("fabric") for problem in self.fabric.problems()]
        return found + self._variable_problems()

    def _variable_problems(self) -> list[Problem]:
        found = variable_problems("environment", self.environment)
        found += variable_problems("overrides", self.overrides)
        found += secret_problems("secrets", self.secrets)
        # A name in two of them would have two values.
        for name in [*self.overrides, *self.secrets]:
            places = [key for key in ("environment", "overrides", "secrets") if name in getattr(self, key)]
            if len(places) > 1:
                rule = f"is in cluster.{places[1]}, too"
                found.append(Problem(f"{places[0]}.{name}", None, rule, "leave one of them out"))
        return found


def gpus_in(gres: str | None) -> int | None:
    """GPUs of a node in a text of generic resources; None if it requests none."""
    # A number alone is a count; types may begin with digits, too: gpu:2080ti:4, gpu:3g.20gb:2, gpu:3090:8.
    counts = re.findall(r"(?:^|,)gpu(?::[\w.-]+?)??(?::(\d+))?(?=,|$)", gres or "")
    return sum(int(count or 1) for count in counts) if counts else None
