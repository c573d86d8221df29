"""Options of sbatch that a cluster's file may add, and those that are taken."""

from collections.abc import Sequence

from k25_train.config.forms import SBATCH_OPTION, repeated
from parallel.config import Problem

OF_KEYS = {
    "job-name": "run.dir", "output": "run.dir", "nodes": "cluster.nodes",
    "gpus-per-node": "cluster.gpus_per_node",
    "time": "cluster.slurm.time_limit_min", "signal": "cluster.slurm.stop_before_end_s",
    "partition": "cluster.slurm.partition", "account": "cluster.slurm.account", "qos": "cluster.slurm.qos",
    "reservation": "cluster.slurm.reservation", "nice": "cluster.slurm.nice",
    "comment": "cluster.slurm.comment",
    "gres": "cluster.slurm.gres", "exclusive": "cluster.slurm.exclusive", "mem": "cluster.slurm.mem",
    "cpus-per-task": "cluster.slurm.cpus_per_task", "constraint": "cluster.slurm.constraint",
    "exclude": "cluster.slurm.exclude", "switches": "cluster.slurm.switches",
    "container-image": "cluster.slurm.container_image", "container-mounts": "cluster.slurm.container_mounts",
    "export": "cluster.environment", "export-file": "cluster.environment",
}  # fmt: skip
"""Option -> the key that decides it."""
OF_LAUNCHER = (
    "requeue", "no-requeue", "no-kill", "wait-all-nodes", "open-mode", "error", "array", "wrap", "wait",
    "ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket", "gpus",
    "gpus-per-task", "gpus-per-socket", "cpus-per-gpu", "mem-per-cpu", "mem-per-gpu", "overcommit",
    "clusters",
    "mincpus", "parsable", "test-only", "quiet", "help", "usage", "version", "uid", "gid",
    "container-env", "container-workdir", "container-name",
)  # fmt: skip
"""Options with which a job would not be one that the launcher can follow, requeue and divide among ranks."""


def option_problems(options: Sequence[str]) -> list[Problem]:
    """Broken rules of `cluster.slurm.sbatch`."""
    found = SBATCH_OPTION.misfits((f"sbatch.{i}", option) for i, option in enumerate(options))
    names = [option.partition("=")[0] for option in options]
    for i, (option, name) in enumerate(zip(options, names, strict=True)):
        # sbatch takes the start of a name for the whole.
        meant = [taken for taken in (*OF_KEYS, *OF_LAUNCHER) if len(name) > 2 and taken.startswith(name[2:])]
        exact = name[2:] if name[2:] in meant else next(iter(meant), None)
        if exact in OF_KEYS:
            rule = f"must not say again what {OF_KEYS[exact]} decides"
            found.append(Problem(f"sbatch.{i}", option, rule, "set that key, and leave this option out"))
        elif exact is not None:
            rule = (
                f"must leave --{exact} to the launcher, which could not follow or continue the job otherwise"
            )
            found.append(Problem(f"sbatch.{i}", option, rule, "leave this option out"))
    twice = ", ".join(repeated(names))
    if twice:
        found.append(Problem("sbatch", twice, "must be given once", "leave the second one out"))
    return found
