"""Submit a training run to SLURM, after checking it while that costs nothing.

    python -m launch.slurm experiment=… cluster=… cluster.nodes=32 [SECTION.KEY=VALUE ...] [--dry-run]

Prints the configuration's main figures and the ranks' environment variables with their reasons, writes the
run folder and submits. The job saves and requeues itself before its time limit, and recovers from faults
(README.md).
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from k25_train.compose.command_line import read_arguments
from k25_train.compose.filled import check_weights_filled_in
from k25_train.compose.resolve import to_yaml
from k25_train.compose.trainable import compose_trainable
from k25_train.config.basics import is_url
from k25_train.config.fabric import AddressFamily
from k25_train.config.schema import Config
from k25_train.entry import run_command
from k25_train.errors import ConfigError
from k25_train.plan.memory.checkpoint import checkpoint_bytes
from k25_train.plan.time.plan_step import expected_step_s
from k25_train.revision import code_version
from k25_train.units import MIB
from launch import scheduler
from launch.attempts import Attempts
from launch.fabric import environment
from launch.feasibility import (
    check_memory,
    check_paths,
    legal_nodes,
    memory_verdict,
    summary,
    with_absolute_paths,
)
from launch.queueing import PATIENCE_S, queue
from launch.sbatch import (
    SUPERVISOR,
    check_environment,
    container_options,
    render,
    start_of_nodes,
    step_options,
)
from launch.submission import SCRIPT, SUPERVISOR_LOG, Submission
from launch.submit_options import MAX_LOG_MIB, argument_parser

CHECKOUT = Path(__file__).resolve().parents[1]
STOP_SHARE = 0.8
"""Share of `cluster.slurm.stop_before_end_s` that ranks may take to stop; the rest is for requeueing."""


def main() -> None:
    """Run the command with the process's arguments."""
    # A job that is being submitted is not given up because nobody reads about it.
    run_command(_run, output_goes_on="--dry-run" not in sys.argv)


def _run() -> None:
    arguments = read_arguments(argument_parser("k25-submit", __doc__ or ""))
    carry_out(compose_trainable(arguments.overrides), arguments)


def carry_out(config: Config, arguments: argparse.Namespace, module: str = SUPERVISOR) -> None:
    """Submit a run, or show what would be; `module`: what its job runs."""
    # Before paths are made absolute, which these are not.
    check_weights_filled_in(config.checkpoint)
    config = with_absolute_paths(config)
    submission, script = prepare(config, arguments.max_restarts, arguments.max_log_mib, module)
    print(*format_summary(config, submission), sep="\n")
    memory = memory_verdict(config)[1] if arguments.force else check_memory(config, submission.legal_nodes)
    if memory:
        print("", *memory, sep="\n")
    if arguments.dry_run:
        print(f"\n# {submission.run}/{SCRIPT}\n{script}", end="")
    else:
        print("", *submit(config, submission, script), sep="\n")


def prepare(
    config: Config, max_restarts: int, max_log_mib: int = MAX_LOG_MIB, module: str = SUPERVISOR
) -> tuple[Submission, str]:
    """The contents of submit.json and the batch script; nothing is written.

    Raises `ConfigError` if the cluster has no SLURM, or a value cannot be used in the script.
    """
    slurm = config.cluster.slurm
    if slurm is None:
        raise ConfigError(
            f"cluster={config.cluster.name}: its slurm is null, so there is nothing to submit to: choose "
            "another cluster, or start the ranks by hand (python -m launch.torchrun)"
        )
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts {max_restarts}: must not be negative; 0 gives up at once")
    if max_log_mib < 0:
        raise ConfigError(f"--max-log-mib {max_log_mib}: must not be negative; 0 keeps everything")
    run, nodes, variables = Path(config.run.dir), legal_nodes(config), environment(config)
    fabric = config.cluster.fabric
    python = os.path.expanduser(slurm.python or sys.executable)
    submission = Submission(
        run=str(run),
        checkout=str(CHECKOUT),
        code=code_version(CHECKOUT),
        python=python if slurm.container_image is None else "python",
        num_steps=config.train.steps,
        ranks_per_node=config.cluster.gpus_per_node,
        legal_nodes=nodes,
        spare_nodes=slurm.spare_nodes,
        max_restarts=max_restarts,
        restart_wait_s=slurm.restart_wait_s,
        stop_within_s=STOP_SHARE * slurm.stop_before_end_s,
        preflight=slurm.preflight,
        rendezvous_port=slurm.rendezvous_port,
        interface=None if fabric is None else fabric.interfaces[0],
        address_family=(AddressFamily.ipv4 if fabric is None else fabric.address_family).value,
        cpus_per_task=slurm.cpus_per_task,
        step_options=step_options(config),
        node_start=start_of_nodes(config, CHECKOUT, variables),
        comment=slurm.comment,
        # The room in an object store is nobody's to watch.
        checkpoint_bytes=0 if is_url(config.checkpoint.dir or "") else checkpoint_bytes(config),
        max_checkpoints=config.checkpoint.keep + 1,
        max_log_bytes=max_log_mib * MIB,
        planned_step_s=expected_step_s(config),
        container=container_options(config, run, CHECKOUT, variables),
        environment=[(name, value, reason) for name, value, reason in variables],
    )
    return submission, render(config, run, CHECKOUT, python, module)


def format_summary(config: Config, submission: Submission) -> Iterable[str]:
    """What a user should see before the job is submitted, line by line."""
    for name, value in (*summary(config, submission.legal_nodes), ("code", submission.code)):
        yield f"{name:<18} {value}"
    yield ""
    secrets = config.cluster.secrets
    yield "variables of the ranks"
    width = max(len(f"{name}={value}") for name, value, _ in submission.environment)
    for name, value, reason in submission.environment:
        yield f"  {f'{name}={value}':<{width}}  {reason}"
    for name, path in secrets.items():
        yield f"  {f'{name}=(secret)':<{width}}  read from {path} when the job starts"
    if submission.step_options:
        yield f"options of srun    {shlex.join(submission.step_options)}"
    if submission.container:
        yield f"container          {shlex.join(submission.container)}"
    slurm = config.cluster.slurm
    if slurm is not None and submission.node_start:
        in_container = slurm.container_image is not None
        yield f"each node runs this first{', in the container' if in_container else ''}"
        yield from (f"  {line}" for line in (slurm.container_setup if in_container else slurm.setup))


def submit(config: Config, submission: Submission, script: str) -> Iterable[str]:
    """Write the run folder and queue the job; returns instructions for following it.

    Raises:
        ConfigError: the run is finished, disk space or files are missing, the partition does not exist or is
            too small, or an environment variable overrides the script.
        SchedulerError: SLURM rejects the job.
        LockedError: another job or process holds the run folder.
    """
    # 1. Everything that can be checked without writing.
    check_environment(os.environ)
    check_unfinished(config)
    check_paths(config)
    check_partition(config)
    # 2. The run folder and the queue: both, or neither.
    job_id, starts = queue(submission, to_yaml(config), script)
    return follow_up(submission, job_id, starts)


def check_unfinished(config: Config) -> None:
    """Raise `ConfigError` if the run has all its steps already."""
    done = Attempts(Path(config.run.dir)).done(config.train.steps)
    if done is not None:
        raise ConfigError(f"run.dir={config.run.dir}: {done}")


def check_partition(config: Config) -> None:
    """Raise `ConfigError` if a partition does not exist, or none has enough nodes in total: SLURM would let
    such a job wait forever."""
    slurm, known = config.cluster.slurm, scheduler.partitions(PATIENCE_S)
    assert slurm is not None
    names = [name for name, partition in known.items() if partition.is_default]
    if slurm.partition is not None:
        # Of several, SLURM chooses the one in which the job starts first.
        names = slurm.partition.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(
                f"cluster.slurm.partition={name}: SLURM has no such partition; use one of {', '.join(known)}"
            )
    if names and all(known[name].num_nodes < config.cluster.nodes for name in names):
        sizes = " and ".join(f"{name} has {known[name].num_nodes}" for name in names)
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}: in total, SLURM's partition {sizes} nodes: use fewer, "
            "or another partition (cluster.slurm.partition)"
        )


def follow_up(submission: Submission, job_id: int, starts: str) -> Sequence[str]:
    """Commands to follow, stop and continue the job."""
    run = Path(submission.run)
    checks = [f"  preflight   cat {run}/attempts/latest/preflight.log"] if submission.preflight else []
    return [
        f"submitted job {job_id}: {starts}",
        f"  decisions   tail -F {run / SUPERVISOR_LOG}",
        *checks,
        f"  training    tail -F {run}/attempts/latest/rank_0.log",
        f"  state       squeue --jobs={job_id}",
        f"  save, stop  scancel --signal=USR1 --batch {job_id}    and goes back to the queue",
        f"  end         scancel {job_id}",
        f"  continue    sbatch {run / SCRIPT}",
    ]


if __name__ == "__main__":
    main()
