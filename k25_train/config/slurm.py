"""What a job requests from SLURM, how it recovers from faults, and what the site needs before it starts."""

import re
from dataclasses import dataclass

from k25_train.config.basics import not_negative
from k25_train.config.forms import (
    COMMENT,
    CONSTRAINT,
    GRES,
    HOST_LIST,
    IMAGE,
    MEMORY,
    NAME,
    NOT_SHOWN,
    PASSWORD_IN_IMAGE,
    PRIVATE_FILE,
    SETUP,
)
from k25_train.config.sbatch_options import option_problems
from k25_train.config.site import SECRET_REMEDY, literal_secrets
from parallel.config import Problem, not_positive

HIGHEST_NICE = 2147483645
"""Largest value of `--nice`. Source: sbatch's manual page."""
CREDENTIALS = ".credentials"
"""Name of the file in which enroot looks for logins. Source: enroot's `doc/cmd/import.md`."""

HOST_OF_IMAGE = re.compile(r"(?:docker://)?(?:[\w-]+(?:\.[\w-]+)+(?::\d+)?|[\w-]+:\d+)/[^#]*")
"""An image whose registry is separated by a slash, as Docker has it."""


@dataclass(slots=True, kw_only=True)
class SlurmConfig:
    """Resources that a job requests from SLURM, and how it recovers from faults."""

    # Queue.
    partition: str | None
    """Queue of the nodes, or several separated by commas; null is the cluster's default."""
    account: str | None
    """Account that is charged; null is the user's default."""
    qos: str | None
    """Quality of service; null is the account's default."""
    reservation: str | None
    """Reservation whose nodes the job may use; null uses none."""
    nice: int | None
    """How far the job's priority is lowered; null leaves it as it is."""
    comment: str | None
    """Comment of the job, as some sites ask for in their accounting; null is none."""
    # Nodes.
    gres: str | None
    """Generic resources of each node, as NAME:COUNT or NAME:TYPE:COUNT, e.g. `gpu:h800:8`; null requests
    `cluster.gpus_per_node` GPUs of any type."""
    exclusive: bool
    """Whether no other job may share the nodes. If false, the partition should hand out whole nodes by
    itself, or `mem` and `cpus_per_task` say what the job gets."""
    mem: str | None
    """Host memory of each node, in MiB or with K, M, G or T; 0 is all of it, null the partition's default."""
    cpus_per_task: int | None
    """CPUs of each node, shared by its ranks: a job has one task per node. Null is what SLURM gives anyway,
    which is all of them if `exclusive`."""
    constraint: str | None
    """Features that the nodes must have, e.g. `h800&roce`; null is any node."""
    exclude: str | None
    """Nodes that the job must not get, e.g. `n[1-3,7]`; null excludes none."""
    switches: int | None
    """Most leaf switches that the nodes may hang on; null is any number."""
    switches_wait_min: int | None
    """Minutes that the job waits for so few switches before it takes any; null is the cluster's
    max_switch_wait (SchedulerParameters), which is also the most that SLURM accepts."""
    sbatch: list[str]
    """Further options of sbatch, each as `--NAME=VALUE`; none that another key or the launcher writes."""
    # Time and faults.
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
    # What runs, and in what.
    setup: list[str]
    """Lines of shell, such as `module load cuda/12.8`, that run first: on the batch host, and on each node
    before its ranks if they run without a container. One that fails ends the start with its text."""
    python: str | None
    """Python of the nodes that runs the supervision and, without a container, the ranks; null is the one that
    submits. A name without a folder is looked up after `setup`."""
    mpi: str | None
    """Plugin of `srun --mpi`, which the ranks do not need: `none` where the cluster's default is one that
    fails without MPI; null is the cluster's default."""
    container_image: str | None
    """Image for pyxis: a squashfs file, or `[docker://][USER@][REGISTRY#]IMAGE[:TAG]`; null runs on the bare
    node."""
    container_mounts: list[str]
    """Folders mounted into the container, as `SOURCE:TARGET`, in addition to the checkout, the run folder and
    the data."""
    container_setup: list[str]
    """Lines of shell that run first in the container, before the ranks of a node."""
    container_credentials: str | None
    """File named `.credentials` with the logins of private registries, in netrc's form, readable by its owner
    only; null leaves enroot with its own setting."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        return [
            *self._time_problems(),
            *self._request_problems(),
            *option_problems(self.sbatch),
            *self._setup_problems(),
            *self._container_problems(),
        ]

    def _time_problems(self) -> list[Problem]:
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
        return found

    def _request_problems(self) -> list[Problem]:
        names = ("partition", "account", "qos", "reservation", "python", "mpi")
        found = NAME.misfits((name, getattr(self, name)) for name in names)
        forms = {
            "gres": GRES, "mem": MEMORY, "constraint": CONSTRAINT, "exclude": HOST_LIST, "comment": COMMENT
        }  # fmt: skip
        for name, form in forms.items():
            found += form.misfits([(name, getattr(self, name))])
        counts = ("cpus_per_task", "switches", "switches_wait_min")
        found += not_positive(self, [name for name in counts if getattr(self, name) is not None])
        if self.switches_wait_min is not None and self.switches is None:
            rule = "says how long to wait for switches, but cluster.slurm.switches is null"
            remedy = "set switches, or both to null"
            found.append(Problem("switches_wait_min", self.switches_wait_min, rule, remedy))
        if self.nice is not None and abs(self.nice) > HIGHEST_NICE:
            rule = f"must lie within -{HIGHEST_NICE} to {HIGHEST_NICE}"
            found.append(Problem("nice", self.nice, rule, "100 is usual; only operators may use less than 0"))
        return found

    def _setup_problems(self) -> list[Problem]:
        lines = [
            (f"{key}.{i}", line)
            for key in ("setup", "container_setup")
            for i, line in enumerate(getattr(self, key))
        ]
        secret = [(name, line) for name, line in lines if literal_secrets(line)]
        rule = "must not hold a secret: config.yaml and the batch script show it"
        found = [Problem(name, NOT_SHOWN, rule, SECRET_REMEDY) for name, _ in secret]
        return found + SETUP.misfits(pair for pair in lines if pair not in secret)

    def _container_problems(self) -> list[Problem]:
        image, file = self.container_image, self.container_credentials
        found = NAME.misfits(
            (f"container_mounts.{i}", mount) for i, mount in enumerate(self.container_mounts)
        )
        if image is not None and PASSWORD_IN_IMAGE.match(image):
            remedy = "put the login into a file, and name that in cluster.slurm.container_credentials"
            found.append(Problem("container_image", NOT_SHOWN, "must not hold a password", remedy))
        elif image is not None and HOST_OF_IMAGE.fullmatch(image):
            rule = (
                "must have # after the registry: otherwise enroot asks Docker Hub for an image of that name"
            )
            found.append(Problem("container_image", image, rule, "write REGISTRY#IMAGE:TAG"))
        else:
            found += IMAGE.misfits([("container_image", image)])
        if file is not None and not (PRIVATE_FILE.fullmatch(file) and file.endswith(f"/{CREDENTIALS}")):
            rule = f"must be the absolute path of a file named {CREDENTIALS}, the only name enroot reads"
            remedy = "e.g. ~/.config/enroot/.credentials, with lines `machine REGISTRY login USER password …`"
            found.append(Problem("container_credentials", repr(file), rule, remedy))
        if image is None and (file is not None or self.container_setup):
            key = "container_credentials" if file is not None else "container_setup"
            rule = "is for a container, but cluster.slurm.container_image is null"
            found.append(Problem(key, getattr(self, key), rule, "set the image, or leave this empty"))
        return found
