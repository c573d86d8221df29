"""The batch script of a run: a template filled with checked values, none of which a shell evaluates."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from k25_train.config.cluster import SAFE_NAME, Device
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from launch.fabric import Variable, environment
from launch.scheduler import node_range
from launch.submission import SCRIPT, SUPERVISOR_LOG

OVERRIDING = {
    f"SBATCH_{name}"
    for name in (
        "ACCOUNT", "ARRAY_INX", "ERROR", "EXCLUSIVE", "GPUS", "GPUS_PER_NODE", "JOB_NAME", "MEM_PER_CPU",
        "MEM_PER_GPU", "MEM_PER_NODE", "NO_KILL", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "PARTITION", "QOS",
        "REQUEUE", "SIGNAL", "TIMELIMIT", "WAIT",
    )
}  # fmt: skip
"""Variables that sbatch takes before the lines of a script."""


def render(config: Config, run: Path, checkout: Path, python: str) -> str:
    """The script.

    Args:
        config: its `cluster.slurm` is not None.
        run: the run folder, absolute.
        checkout: folder of the code, absolute.
        python: interpreter of the supervisor.

    Raises:
        ConfigError: a path has characters that SLURM would misread.
    """
    for key, path in (("run.dir", run), ("the code's folder", checkout), ("cluster.slurm.python", python)):
        check_path(key, str(path))
    template = Template((resources.files("launch") / "templates" / SCRIPT).read_text())
    return template.substitute(
        script=run / SCRIPT,
        cluster=config.cluster.name,
        directives="\n".join(f"#SBATCH --{option}" for option in directives(config, run)),
        exports="\n".join(export(variable) for variable in environment(config)),
        checkout=shlex.quote(str(checkout)),
        python=shlex.quote(python),
        run=shlex.quote(str(run)),
    )


def check_path(key: str, path: str) -> None:
    """Raise `ConfigError` for a path that a `#SBATCH` line or an option of srun could not carry."""
    if not SAFE_NAME.fullmatch(path):
        raise ConfigError(
            f"{key}={path!r}: must consist of letters, digits and @+=:,./~-_ only, as SLURM takes others for "
            "quotes, comments or patterns: rename it, or link to it by another path"
        )


def check_environment(variables: Iterable[str]) -> None:
    """Raise `ConfigError` if one of these variables makes sbatch ignore a line of the script."""
    overriding = sorted(OVERRIDING & set(variables))
    if overriding:
        raise ConfigError(
            f"{', '.join(overriding)}: in the environment, it would make sbatch ignore what the script asks "
            "for: unset it, and put its value into the cluster's file"
        )


def directives(config: Config, run: Path) -> Iterator[str]:
    """Options of sbatch."""
    slurm, cluster = config.cluster.slurm, config.cluster
    assert slurm is not None
    yield f"job-name=k25-{run.name}"
    for name in ("partition", "account", "qos"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"{name}={value}"
    yield f"nodes={node_range(cluster.nodes, cluster.nodes + slurm.spare_nodes)}"
    if cluster.device is Device.cuda:
        yield f"gpus-per-node={cluster.gpus_per_node}"
    yield "exclusive"
    yield "mem=0"
    yield f"time={slurm.time_limit_min}"
    yield f"signal=B:USR1@{slurm.stop_before_end_s}"
    # After the loss of its first node, the job comes back by itself; after that of another, it goes on.
    yield "requeue"
    yield "no-kill"
    # Else it starts as soon as the first node is up, where others are still powered on.
    yield "wait-all-nodes=1"
    yield "open-mode=append"
    yield f"output={run / SUPERVISOR_LOG}"


def export(variable: Variable) -> str:
    """A variable with its reason above."""
    # Quotes even where the shell needs none: NAME==value reads like a comparison.
    quoted = shlex.quote(variable.value)
    quoted = quoted if quoted != variable.value else f"'{quoted}'"
    return f"# {variable.reason}\nexport {variable.name}={quoted}"


def container_options(config: Config, run: Path, checkout: Path, variables: Sequence[Variable]) -> list[str]:
    """Options of srun, understood by pyxis, that start a task in the cluster's image; none without one.

    The code is that of the checkout, not what the image may hold: it is what the run's folder names.
    """
    slurm = config.cluster.slurm
    if slurm is None or slurm.container_image is None:
        return []
    tokenizer = [] if config.data.tokenizer is None else [config.data.tokenizer]
    own = [str(checkout), str(run), config.data.dir, *tokenizer]
    for path in own:
        check_path("what is mounted into the container", path)
        if {",", ":"} & set(path):
            raise ConfigError(
                f"{path}: is mounted into the container, where `,` and `:` divide mounts: link to it by "
                "another path"
            )
    mounts = [*(f"{path}:{path}" for path in own), *slurm.container_mounts]
    return [
        f"--container-image={slurm.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={checkout}",
        # Else the image's own settings of the same names would win.
        f"--container-env={','.join(variable.name for variable in variables)}",
    ]
