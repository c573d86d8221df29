"""The batch script of a run: a template filled with checked values, none of which the shell evaluates."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from k25_train.config.basics import is_url
from k25_train.config.cluster import ClusterConfig, Device, gpus_in
from k25_train.config.forms import SAFE_NAME
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from launch.fabric import environment
from launch.scheduler import node_range
from launch.setup import batch_setup, check_setup, node_start
from launch.submission import SCRIPT, SUPERVISOR_LOG
from launch.variables import Variable, unset_foreign

SUPERVISOR = "launch.supervisor"
OVERRIDING = {
    f"SBATCH_{name}"
    for name in (
        "ACCOUNT", "ARRAY_INX", "CLUSTERS", "CONSTRAINT", "CPUS_PER_GPU", "ERROR", "EXCLUSIVE", "GPUS",
        "GPUS_PER_NODE", "GPUS_PER_TASK", "GRES", "JOB_NAME", "MEM_PER_CPU", "MEM_PER_GPU", "MEM_PER_NODE",
        "NO_KILL", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "OVERCOMMIT", "PARTITION", "QOS", "REQ_SWITCH",
        "REQUEUE", "RESERVATION", "SIGNAL", "TIMELIMIT", "WAIT", "WAIT_ALL_NODES", "WAIT4SWITCH",
    )
}  # fmt: skip
"""Environment variables that take precedence over the `#SBATCH` lines of a script."""


def render(config: Config, run: Path, checkout: Path, python: str, module: str = SUPERVISOR) -> str:
    """The batch script.

    Args:
        config: configuration whose `cluster.slurm` is not None.
        run: the run folder, absolute.
        checkout: folder of the code, absolute.
        python: interpreter of the supervisor.
        module: what replaces the script's shell.

    Raises:
        ConfigError: a path has characters that SLURM would misread.
    """
    # `#SBATCH` lines and srun's options know no quotes, so paths are checked instead.
    for key, path in (("run.dir", run), ("the code's folder", checkout), ("cluster.slurm.python", python)):
        check_path(key, str(path))
    # Everything else that reaches the shell is quoted.
    template = Template((resources.files("launch") / "templates" / SCRIPT).read_text(encoding="utf-8"))
    return template.substitute(
        script=run / SCRIPT,
        cluster=config.cluster.name,
        directives="\n".join(f"#SBATCH --{option}" for option in directives(config, run)),
        setup=batch_setup(config.cluster.slurm.setup if config.cluster.slurm else []),
        unset=unset_foreign(),
        exports="\n".join([*map(export, environment(config)), *export_secrets(config.cluster)]),
        checkout=shlex.quote(str(checkout)),
        python=shlex.quote(python),
        module=module,
        run=shlex.quote(str(run)),
    )


def check_path(key: str, path: str) -> None:
    """Raise `ConfigError` for a path that a `#SBATCH` line or an option of srun could not carry."""
    if not SAFE_NAME.fullmatch(path):
        raise ConfigError(
            f"{key}={path!r}: must consist of letters, digits and @+=:,./~-_ only, as SLURM takes others for "
            "quotes, comments or patterns: rename it, or link to it from another path"
        )


def check_environment(variables: Iterable[str]) -> None:
    """Raise `ConfigError` if one of these variables makes sbatch ignore a line of the script."""
    overriding = sorted(OVERRIDING & set(variables))
    if overriding:
        raise ConfigError(
            f"{', '.join(overriding)}: set in the environment, it would make sbatch ignore what the script "
            "requests: unset it, and put its value into the cluster's file"
        )


def directives(config: Config, run: Path) -> Iterator[str]:
    """Options of sbatch."""
    slurm, cluster = config.cluster.slurm, config.cluster
    assert slurm is not None
    # Queue.
    yield f"job-name=k25-{run.name}"
    for name in ("partition", "account", "qos", "reservation", "nice"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"{name}={value}"
    if slurm.comment is not None:
        # The only text that may have spaces; it has no character that quotes do not protect.
        yield f'comment="{slurm.comment}"' if " " in slurm.comment else f"comment={slurm.comment}"
    # Nodes, for a limited time.
    yield from _node_options(cluster)
    yield f"time={slurm.time_limit_min}"
    yield f"signal=B:USR1@{slurm.stop_before_end_s}"
    # If a node is lost, the job goes on with the others. If it is the first, so is the supervisor, and SLURM
    # (22.05) neither ends nor requeues the job: `launch.standby` does.
    yield "requeue"
    yield "no-kill"
    # Otherwise it would start once the first node is up, while others are still powering on.
    yield "wait-all-nodes=1"
    yield "open-mode=append"
    yield f"output={run / SUPERVISOR_LOG}"
    # What the site wants in addition.
    yield from (option.removeprefix("--") for option in slurm.sbatch)


def _node_options(cluster: ClusterConfig) -> Iterator[str]:
    """Options that say which nodes, and what of them."""
    slurm = cluster.slurm
    assert slurm is not None
    yield f"nodes={node_range(cluster.nodes, cluster.nodes + slurm.spare_nodes)}"
    if cluster.device is Device.cuda and gpus_in(slurm.gres) is None:
        yield f"gpus-per-node={cluster.gpus_per_node}"
    if slurm.gres is not None:
        yield f"gres={slurm.gres}"
    if slurm.exclusive:
        yield "exclusive"
    if slurm.mem is not None:
        yield f"mem={slurm.mem}"
    if slurm.cpus_per_task is not None:
        # Not by tasks: SLURM counts them for the fewest nodes and gives no more nodes than tasks: no spare.
        yield f"mincpus={slurm.cpus_per_task}"
    for name in ("constraint", "exclude"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"{name}={value}"
    if slurm.switches is not None:
        wait = "" if slurm.switches_wait_min is None else f"@{slurm.switches_wait_min}"
        yield f"switches={slurm.switches}{wait}"


def export(variable: Variable) -> str:
    """The shell line that exports a variable, with its reason in a comment above."""
    # Quoted even if the shell needs no quotes: NAME==value reads like a comparison.
    quoted = shlex.quote(variable.value)
    quoted = quoted if quoted != variable.value else f"'{quoted}'"
    return f"# {variable.reason}\nexport {variable.name}={quoted}"


def export_secrets(cluster: ClusterConfig) -> Iterator[str]:
    """Shell lines that export the secret variables, each read from its file when the job starts."""
    for name, path in cluster.secrets.items():
        yield "# secret: read when the job starts, so that it is in no file of the run and in no command line"
        yield f"{name}=$(< {shlex.quote(path)})"
        yield f"export {name}"


def start_of_nodes(config: Config, checkout: Path, variables: Sequence[Variable]) -> list[str]:
    """The command that precedes that of every node's ranks, in the container if there is one; empty without
    setup. Raises `ConfigError` for a line that is no command."""
    slurm = config.cluster.slurm
    assert slurm is not None
    for name in ("setup", "container_setup"):
        check_setup(f"cluster.slurm.{name}", getattr(slurm, name))
    name = "setup" if slurm.container_image is None else "container_setup"
    exports = [export(variable) for variable in variables]
    return node_start(f"cluster.slurm.{name}", getattr(slurm, name), exports, str(checkout))


def step_options(config: Config) -> list[str]:
    """Options of every srun."""
    slurm = config.cluster.slurm
    return [f"--mpi={slurm.mpi}"] if slurm is not None and slurm.mpi is not None else []


def container_options(config: Config, run: Path, checkout: Path, variables: Sequence[Variable]) -> list[str]:
    """Options of srun for the pyxis plugin, which start a task in the cluster's image; empty without an
    image.

    The container runs the code of the checkout, which the run folder records, not a copy in the image.
    """
    slurm = config.cluster.slurm
    if slurm is None or slurm.container_image is None:
        return []
    saved = (config.checkpoint.dir, config.checkpoint.local_dir, config.checkpoint.init_from)
    given = [path for path in (*saved, *config.checkpoint.init_parts.values()) if path is not None]
    places = (path for path in [*given, *config.data.folders()] if not is_url(path))
    own = list(dict.fromkeys([str(checkout), str(run), *places]))
    for path in own:
        check_path("what is mounted into the container", path)
        if {",", ":"} & set(path):
            raise ConfigError(
                f"{path}: is mounted into the container, where `,` and `:` separate mounts: link to it from "
                "another path"
            )
    mounts = [*(f"{path}:{path}" for path in own), *slurm.container_mounts]
    return [
        f"--container-image={slurm.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={checkout}",
        # Otherwise the image's own variables of these names would win.
        f"--container-env={','.join([*(variable.name for variable in variables), *config.cluster.secrets])}",
    ]
