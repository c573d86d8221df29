"""Reinforcement learning whose event loops are spread over nodes by Ray.

    python -m launch.ray experiment=… [KEY=VALUE ...]                  Ray and the run, on this machine
    python -m launch.ray experiment=… cluster=… cluster.nodes=32 [...] submits a job of SLURM that has both

Where the cluster's file has `slurm`, all is as for launch.slurm, with Ray on the job's nodes as long as it
lives; otherwise as for launch.torchrun. rollout.manager.placement=ray is added, and RAY_ADDRESS set.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from k25_train.compose.command_line import read_arguments
from k25_train.compose.trainable import compose_trainable
from k25_train.entry import run_command
from k25_train.errors import ConfigError
from launch.forwarding import Forwarding
from launch.ray.cluster import running
from launch.ray.plan import ADDRESS, LOG, Place, here
from launch.rendezvous import free_port
from launch.slurm import carry_out
from launch.submit_options import argument_parser
from launch.torchrun import LOOPBACK, find_place, meet, start_command, variables_of

if TYPE_CHECKING:
    from k25_train.config.schema import Config

RANKS = "k25_train.any_run"
PLACEMENT = "rollout.manager.placement=ray"
FIRST_PORT, NUM_PORTS = 6379, 100
"""Ray's own, and how many are tried from it on."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run, output_goes_on="--dry-run" not in sys.argv)


def _run() -> int:
    arguments = read_arguments(argument_parser("python -m launch.ray", __doc__ or ""))
    overrides = [*arguments.overrides, PLACEMENT]
    config = compose_trainable(overrides)
    if config.cluster.slurm is not None:
        carry_out(config, arguments, module="launch.ray.job")
        return 0
    check_nodes(config)
    if arguments.dry_run:
        for name, value in variables_of(config, {}).items():
            print(f"export {name}={value}")
        place = Place(LOOPBACK, str(FIRST_PORT))
        print(*(shlex.join(step.command) for step in here(sys.executable, place).steps), sep="\n")
        print(shlex.join(start_command(config, find_place(config, None, None), RANKS, overrides)))
        return 0
    return run_here(config, overrides)


def check_nodes(config: "Config") -> None:
    """Raise `ConfigError` for more nodes than this one."""
    if config.cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}: cluster={config.cluster.name} has no SLURM to start "
            f"them: start Ray on each, set {ADDRESS}, and use launch.torchrun with {PLACEMENT}"
        )


def run_here(config: "Config", overrides: list[str]) -> int:
    """Start Ray on this machine and train as long as it takes; returns torchrun's status."""
    # Signals that come before there are ranks end it; later ones are theirs.
    forwarding = Forwarding()
    place = Place(LOOPBACK, str(free_port(range(FIRST_PORT, FIRST_PORT + NUM_PORTS))))
    with tempfile.TemporaryDirectory(prefix="k25_ray_") as scratch:
        folder = Path(scratch)
        with running(here(sys.executable, place), os.environ, folder, folder / LOG) as cluster:
            cluster.wait(lambda: bool(forwarding.received))
            if forwarding.received:
                return 128 + forwarding.received[0]
            ranks = find_place(config, None, None)
            variables = variables_of(config, cluster.environment)
            meet(config, ranks)
            command = start_command(config, ranks, RANKS, overrides)
            sys.stdout.flush()
            return forwarding.run(command, variables | {ADDRESS: f"{place.address}:{place.port}"})


if __name__ == "__main__":
    main()
