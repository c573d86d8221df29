"""Check the nodes and the fabric of a job before it costs anything.

    python -m launch.preflight [experiment=NAME] [cluster=NAME] [SECTION.KEY=VALUE ...]
    torchrun --nnodes N --nproc-per-node G ... -m launch.preflight experiment=NAME cluster=NAME ...

Alone it looks at this node. Started on all ranks, as training is, it also measures matrix products, copies to
the GPU, and the connections of the expert and pipeline groups, and compares nodes. Rank 0 prints every check
with its verdict and writes preflight.json. Ends with status 1 if a node fails. Without an experiment it is
the smoke experiment's.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from k25_train.compose.command_line import exit_with_shared
from k25_train.compose.resolve import compose, load
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from launch.preflight.machine import Machine

JOIN_TIMEOUT_S = 300.0
"""In which all ranks have met; their imports take a minute from a cold shared file system."""
DEFAULT = "experiment=smoke"


def main() -> None:
    """Run the command with the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="k25-preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's submit.yaml, in place of conf/")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="of preflight.json (run.dir)")
    parser.add_argument(
        "--node-names",
        type=lambda names: names.split(","),
        metavar="NODE,NODE,...",
        help="what to call the nodes, in their order (as they call themselves)",
    )
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides
    try:
        config = load(arguments.config, overrides) if arguments.config else compose(with_default(overrides))
        check_started(config)
        folder = arguments.report or Path(config.run.dir)
        make_folder(folder)
        check_names(arguments.node_names, config)
    except ConfigError as error:
        exit_with_shared(error)
    # torch is imported from here on: everything above works on a login node.
    from launch.preflight.coordination import join
    from launch.preflight.job import run_preflight

    meeting = join(JOIN_TIMEOUT_S, arguments.node_names)
    # Logs of a scheduler are no terminal, and 80 columns are few for a sentence.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if meeting.is_first:
        console.print(
            f"preflight of {config.run.dir}: {cluster_of(config)}\n", highlight=False, soft_wrap=True
        )
    # SLURM's name for the node, as that is the one to drain.
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    is_sound = run_preflight(config, meeting, Machine(), host, console, folder)
    sys.stdout.flush()
    # A connection that hangs would keep the interpreter from ending.
    os._exit(0 if is_sound else 1)


def check_names(names: Sequence[str] | None, config: Config) -> None:
    """Raise `ConfigError` unless every node has a name, if they are given."""
    if names is not None and len(names) != config.cluster.nodes:
        raise ConfigError(f"--node-names: {len(names)} names, but cluster.nodes={config.cluster.nodes}")


def make_folder(folder: Path) -> None:
    """Raise `ConfigError` if the report would find no place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot hold the report ({error.strerror}): name another folder (--report, run.dir)"
        ) from error


def with_default(overrides: Sequence[str]) -> list[str]:
    """The overrides, of the smoke experiment if they name none."""
    named = any(override.startswith("experiment=") for override in overrides)
    return [*overrides] if named else [DEFAULT, *overrides]


def cluster_of(config: Config) -> str:
    """What the checks hold the machines against."""
    cluster = config.cluster
    return (
        f"cluster {cluster.name}, {cluster.nodes} x {cluster.gpus_per_node} ranks on {cluster.device.value}"
    )


def check_started(config: Config) -> None:
    """Raise `ConfigError` if torchrun started other ranks than the configuration counts on."""
    if "RANK" not in os.environ:
        return
    cluster = config.cluster
    started = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if started != (config.world_size, cluster.gpus_per_node):
        raise ConfigError(
            f"{started[0]} ranks started, {started[1]} a node, but cluster.nodes={cluster.nodes} x "
            f"cluster.gpus_per_node={cluster.gpus_per_node} are configured: start them with "
            f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.gpus_per_node}, or correct both"
        )


if __name__ == "__main__":
    main()
