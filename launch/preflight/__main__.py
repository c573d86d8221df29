"""Check the nodes and the fabric of a job before it costs anything.

    python -m launch.preflight [experiment=NAME] [cluster=NAME] [SECTION.KEY=VALUE ...]
    torchrun --nnodes N --nproc-per-node G ... -m launch.preflight experiment=NAME cluster=NAME ...

On its own it checks this node. Started on all ranks, as training is, it also measures matrix products, copies
to the GPU, and the connections of the expert and pipeline groups, and compares nodes. Rank 0 prints every
check with its verdict and writes preflight.json. Exits with status 1 if a node fails. Without an experiment
it uses the smoke experiment.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from k25_train import farewell
from k25_train.compose.command_line import load_saved, read_arguments
from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.entry import report, run_command, shared
from k25_train.errors import ConfigError
from k25_train.joining.environment import number_of
from launch.preflight.system import System
from launch.variables import NODE_NAME

JOIN_TIMEOUT_S = 300.0
"""Time within which all ranks must meet; imports from a cold shared file system take a minute."""
DEFAULT_EXPERIMENT = "experiment=smoke"


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="k25-preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's submit.yaml, in place of conf/")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="folder of preflight.json (run.dir)")
    parser.add_argument(
        "--node-names",
        type=lambda names: names.split(","),
        metavar="NODE,NODE,...",
        help="names of the nodes, in order (host names)",
    )
    try:
        arguments = read_arguments(parser)
        overrides = arguments.overrides
        saved = arguments.config
        config = load_saved(saved, overrides) if saved else compose(with_default(overrides))
        check_world_size(config)
        folder = arguments.report or Path(config.run.dir)
        make_folder(folder)
        check_node_names(arguments.node_names, config)
    except ConfigError as error:
        raise shared(error) from error
    # torch is imported only from here on: everything above works on a login node.
    from launch.preflight.coordination import join
    from launch.preflight.job import run_preflight

    coordinator = join(JOIN_TIMEOUT_S, arguments.node_names)
    # A scheduler's log is not a terminal, and rich's default of 80 columns is too narrow for sentences.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if coordinator.is_first:
        console.print(
            f"preflight of {config.run.dir}: {describe_cluster(config)}\n", highlight=False, soft_wrap=True
        )
    # SLURM's or Kubernetes' name for the node, which is the one to drain.
    names = (os.environ.get(name) for name in ("SLURMD_NODENAME", NODE_NAME))
    host = next(filter(None, names), socket.gethostname())
    try:
        status = 0 if run_preflight(config, coordinator, System(), host, console, folder) else 1
    except Exception as error:
        status = report(error)
    sys.stdout.flush()
    if status == 0:
        farewell.is_done()
    # A hanging connection would keep the interpreter from exiting.
    os._exit(status)


def check_node_names(names: Sequence[str] | None, config: Config) -> None:
    """Raise `ConfigError` if node names are given, but not one for each node."""
    if names is not None and len(names) != config.cluster.nodes:
        raise ConfigError(f"--node-names: {len(names)} names, but cluster.nodes={config.cluster.nodes}")


def make_folder(folder: Path) -> None:
    """Raise `ConfigError` if the folder for the report cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot hold the report ({error.strerror}): choose another folder (--report, run.dir)"
        ) from error


def with_default(overrides: Sequence[str]) -> list[str]:
    """The overrides, with the smoke experiment if they name none."""
    named = any(override.startswith("experiment=") for override in overrides)
    return [*overrides] if named else [DEFAULT_EXPERIMENT, *overrides]


def describe_cluster(config: Config) -> str:
    """The cluster that the checks compare the nodes with."""
    cluster = config.cluster
    return (
        f"cluster {cluster.name}, {cluster.nodes} x {cluster.gpus_per_node} ranks on {cluster.device.value}"
    )


def check_world_size(config: Config) -> None:
    """Raise `ConfigError` if torchrun started another number of ranks than configured."""
    if "RANK" not in os.environ:
        return
    cluster = config.cluster
    started = number_of("WORLD_SIZE", 1), number_of("LOCAL_WORLD_SIZE", 1)
    if started != (config.world_size, cluster.gpus_per_node):
        raise ConfigError(
            f"{started[0]} ranks started, {started[1]} per node, but cluster.nodes={cluster.nodes} x "
            f"cluster.gpus_per_node={cluster.gpus_per_node} are configured: start them with "
            f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.gpus_per_node}, or correct both"
        )


if __name__ == "__main__":
    main()
