"""What a cluster that is run by Kubernetes is asked for: one pod on each node, as a JobSet."""

import re
from dataclasses import dataclass
from enum import Enum

from k25_train.config.forms import Form
from parallel.config import Problem, not_positive

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME_OF_KEY = r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?"
OBJECT = Form(
    re.compile(rf"{_LABEL}(\.{_LABEL})*", re.ASCII),
    "must be the name of a Kubernetes object: lower-case letters, digits, - and ., at most 63 in each part",
    "see `kubectl get`",
)
LABEL = Form(
    re.compile(_LABEL, re.ASCII),
    "must consist of lower-case letters, digits and -, at most 63",
    "rename it",
)
KEY = Form(
    re.compile(rf"({_LABEL}(\.{_LABEL})*/)?{_NAME_OF_KEY}", re.ASCII),
    "must be the key of a label, taint or resource, NAME or DOMAIN/NAME",
    "e.g. nvidia.com/gpu; `kubectl describe node` lists them",
)
LABEL_VALUE = Form(
    re.compile(rf"({_NAME_OF_KEY})?", re.ASCII),
    "must be the value of a label: letters, digits and .-_, at most 63",
    "`kubectl get nodes --show-labels` lists them",
)
QUANTITY = Form(
    re.compile(r"\d+(m|k|M|G|T|Ki|Mi|Gi|Ti)?", re.ASCII),
    "must be an amount as Kubernetes writes it",
    "e.g. 1, 500m or 64Gi",
)
REFERENCE = Form(
    re.compile(
        rf"({_LABEL}(\.{_LABEL})*(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{{0,127}})?"
        r"(@sha256:[0-9a-f]{64})?",
        re.ASCII,
    ),
    "must be [REGISTRY/]NAME[:TAG][@sha256:DIGEST], without a scheme",
    "e.g. registry.example.org/team/k25-train@sha256:… (`docker images --digests` lists them)",
)
MOUNT = Form(
    re.compile(r"/[\w@+=,./~-]*[\w@+=,~-]", re.ASCII),
    "must be the absolute path of a folder other than /, of letters, digits and @+=,./~-_",
    "e.g. /runs",
)
NETWORKS = Form(
    re.compile(r"[\w./@-]+(,\s*[\w./@-]+)*", re.ASCII),
    "must be names of Multus' networks, [NAMESPACE/]NAME[@INTERFACE], separated by commas",
    "`kubectl get network-attachment-definitions` lists them",
)
RESERVED_MOUNTS = ("/dev/shm", "/tmp", "/etc/k25-train")
"""Folders that the manifest mounts itself."""


class Effect(Enum):
    """What a taint does to pods that do not tolerate it."""

    no_schedule = "NoSchedule"
    prefer_no_schedule = "PreferNoSchedule"
    no_execute = "NoExecute"


@dataclass(slots=True, kw_only=True)
class Toleration:
    """A taint of the nodes that pods tolerate; its key is the name under which this is filed."""

    value: str | None
    """The taint's value; null is any."""
    effect: Effect | None
    """What the taint does; null is any of the effects."""


@dataclass(slots=True, kw_only=True)
class ClaimedVolume:
    """A PersistentVolumeClaim that every pod mounts; access mode ReadWriteMany, or ReadOnlyMany."""

    claim: str
    """Name of the claim, which exists already."""
    mount: str
    """Folder where pods see it; `run.dir` and `data.dir` are paths below it."""
    read_only: bool
    """Whether pods only read it."""


@dataclass(slots=True, kw_only=True)
class KubernetesConfig:
    """One pod on each node, all started together. Keys that are null leave the cluster's default."""

    namespace: str | None
    """Namespace of everything; null is that of kubectl's context."""
    image: str
    """Image of the pods, best by digest: a restart then runs what the first start did."""
    pull_secret: str | None
    """Secret with the registry's login."""
    service_account: str | None
    """Service account of the pods; they need no permissions, so they get no token either way."""
    queue: str | None
    """LocalQueue of Kueue, which starts all pods of a job or none; null leaves that to the scheduler."""
    topology: str | None
    """Node label within one value of which Kueue places all pods, e.g. a switch or a pod of racks."""
    priority_class: str | None
    """PriorityClass of the pods."""
    runtime_class: str | None
    """RuntimeClass of the pods, e.g. nvidia."""
    node_selector: dict[str, str]
    """Labels that nodes must have."""
    exclude: list[str]
    """Nodes that must not be used, by their label kubernetes.io/hostname."""
    tolerations: dict[str, Toleration]
    """Key of a taint -> toleration of it."""
    gpu_resource: str
    """Resource of which a pod gets `cluster.gpus_per_node`, where the device is a GPU."""
    resources: dict[str, str]
    """Further resources of a pod, requested and limited alike: the RDMA device plugin's, cpu, memory."""
    shm_gib: int
    """Size of /dev/shm, in memory: NCCL's buffers within a node and the loader's batches; the container
    runtime's default of 64 MiB is too small. Counts towards a limit of memory."""
    host_network: bool
    """Whether pods use the node's network, so that `cluster.fabric` names the node's interfaces."""
    networks: str | None
    """Networks of Multus in addition to the pod network; `cluster.fabric.interface` is net1, net2, … then."""
    volumes: dict[str, ClaimedVolume]
    """Name -> volume."""
    run_as: int | None
    """User id of the pods' processes, which owns what they write; null is the image's."""
    secret: str | None
    """Secret whose keys are the names of `cluster.secrets`: pods get values from there, not from files."""
    port: int
    """Port at which nodes meet for preflight; for training it is the next one."""
    preflight: bool
    """Whether nodes and fabric are checked before each start."""
    grace_s: int
    """Longest time from SIGTERM to SIGKILL, when a pod is evicted or deleted: ranks finish their step and
    save."""
    max_restarts: int
    """Restarts after failures; evictions and preemptions do not count."""
    time_limit_min: int | None
    """Longest time of an attempt; null is none."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = self._name_problems() + self._placement_problems() + self._volume_problems()
        found += not_positive(self, ("shm_gib", "grace_s"))
        if self.time_limit_min is not None:
            found += not_positive(self, ("time_limit_min",))
        if self.max_restarts < 0:
            found.append(Problem("max_restarts", self.max_restarts, "must not be negative", "use 0 for none"))
        if self.run_as is not None and self.run_as < 0:
            found.append(Problem("run_as", self.run_as, "must not be negative", "use 0 for root"))
        if not 1024 <= self.port <= 65534:
            rule = "must be a port that users may open, 1024 to 65534, as the next one is used too"
            found.append(Problem("port", self.port, rule, "e.g. 29500"))
        return found

    def _name_problems(self) -> list[Problem]:
        names = ("namespace", "pull_secret", "service_account", "queue", "priority_class", "runtime_class")
        found = OBJECT.misfits((name, getattr(self, name)) for name in (*names, "secret"))
        found += REFERENCE.misfits([("image", self.image)])
        found += KEY.misfits([("gpu_resource", self.gpu_resource), ("topology", self.topology)])
        found += NETWORKS.misfits([("networks", self.networks)])
        return found

    def _placement_problems(self) -> list[Problem]:
        found = KEY.misfits((f"node_selector.{key}", key) for key in self.node_selector)
        found += LABEL_VALUE.misfits(
            (f"node_selector.{key}", value) for key, value in self.node_selector.items()
        )
        found += KEY.misfits((f"tolerations.{key}", key) for key in self.tolerations)
        found += KEY.misfits((f"resources.{key}", key) for key in self.resources)
        found += QUANTITY.misfits((f"resources.{key}", value) for key, value in self.resources.items())
        found += OBJECT.misfits((f"exclude.{i}", node) for i, node in enumerate(self.exclude))
        if self.topology is not None and self.queue is None:
            rule = "is Kueue's, but cluster.kubernetes.queue is null"
            found.append(Problem("topology", self.topology, rule, "name a queue, or set both to null"))
        if self.networks is not None and self.host_network:
            rule = "adds networks to a pod, but with host_network it has the node's"
            found.append(Problem("networks", self.networks, rule, "set it to null, or host_network to false"))
        return found

    def _volume_problems(self) -> list[Problem]:
        found = LABEL.misfits((f"volumes.{name}", name) for name in self.volumes)
        for name, volume in self.volumes.items():
            found += OBJECT.misfits([(f"volumes.{name}.claim", volume.claim)])
            found += MOUNT.misfits([(f"volumes.{name}.mount", volume.mount)])
            if volume.mount in RESERVED_MOUNTS:
                rule = "is mounted by the manifest itself"
                found.append(Problem(f"volumes.{name}.mount", volume.mount, rule, "use another folder"))
        mounts = [volume.mount for volume in self.volumes.values()]
        for mount in {mount for mount in mounts if mounts.count(mount) > 1}:
            rule = "is where another volume is mounted, too"
            found.append(Problem("volumes", mount, rule, "give each volume a folder of its own"))
        return found
