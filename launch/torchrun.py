"""Start the ranks of one node by hand, without SLURM: one command per node, identical except for --node.

    python -m launch.torchrun experiment=…    a job of this node alone

    python -m launch.torchrun --node 0 --first-node HOST[:PORT] experiment=… cluster=… cluster.nodes=2
    python -m launch.torchrun --node 1 --first-node HOST[:PORT] experiment=… cluster=… cluster.nodes=2

With --preflight the ranks check their nodes and the connections between them instead of training.
Checks the configuration, sets the fabric's variables, checks that the port is free (on node 0) or that the
first node can be reached (on the others), and becomes torchrun.
"""

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence

from k25_train.entry import run_command
from launch import rendezvous

DEFAULT_PORT, LAST_PORT = 29500, 65535
LOOPBACK = "127.0.0.1"


def torchrun(
    python: str, *, num_nodes: int, node: int, ranks: int, address: str, port: int, command: Sequence[str]
) -> list[str]:
    """The command that starts a node's ranks.

    The static rendezvous assigns ranks by node number: rank 0 is on the node where the others look for it,
    and neighbours in SLURM's order are neighbours in the job. The dynamic rendezvous guarantees neither
    (pytorch#137402). A failed job is restarted from outside, so torchrun restarts nothing.
    """
    return [
        python,
        "-m",
        "launch.agent",
        f"--nnodes={num_nodes}",
        f"--node-rank={node}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={address}",
        f"--master-port={port}",
        f"--rdzv-conf=timeout={rendezvous.JOIN_S:g}",
        "--max-restarts=0",
        *command,
    ]


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    # Imported late: launch.node uses `torchrun` on nodes that have the standard library only.
    from k25_train.compose.command_line import read_arguments

    parser = argparse.ArgumentParser(
        prog="python -m launch.torchrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--node", type=int, default=0, help="index of this node, from 0")
    parser.add_argument(
        "--first-node", metavar="HOST[:PORT]", help="address of node 0; may be left out for one node"
    )
    parser.add_argument("--preflight", action="store_true", help="check the nodes instead of training")
    arguments = read_arguments(parser)
    module = "launch.preflight" if arguments.preflight else "k25_train.train"
    command, variables = prepare(arguments.overrides, arguments.node, arguments.first_node, module)
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **variables})


def prepare(
    overrides: Sequence[str], node: int, first_node: str | None, module: str
) -> tuple[list[str], dict[str, str]]:
    """torchrun's command, whose ranks run `module`, and the variables it needs; returns once the ranks can
    meet.

    Raises:
        ConfigError: the configuration is invalid, `node` is out of range, or `first_node` is not an address.
        RendezvousError: the port is taken, or the first node does not answer.
    """
    # Imported late: launch.node uses `torchrun` on nodes that have the standard library only.
    from k25_train.compose.resolve import compose
    from k25_train.errors import ConfigError
    from launch.fabric import environment
    from launch.variables import secrets_of

    # 1. Check the arguments.
    config = compose(overrides)
    if not 0 <= node < config.cluster.nodes:
        raise ConfigError(
            f"--node {node}: must be within 0 to cluster.nodes - 1 ({config.cluster.nodes - 1})"
        )
    if first_node is None:
        first_node = _this_node(config.cluster.nodes)
    match = re.fullmatch(r"([^:\s\[\]]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(\d+))?", first_node)
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= LAST_PORT:
        raise ConfigError(
            f"--first-node {first_node}: must be HOST or HOST:PORT, a name, IPv4 address or [IPv6 address], "
            f"and a port within 1 to {LAST_PORT}"
        )
    # 2. Make sure that the ranks can meet.
    address = match[1].strip("[]")
    if node:
        rendezvous.wait_for(address, port)
    else:
        rendezvous.free_port([port])
    # 3. The command.
    command = torchrun(
        sys.executable,
        num_nodes=config.cluster.nodes,
        node=node,
        ranks=config.cluster.gpus_per_node,
        address=address,
        port=port,
        command=["-m", module, *overrides],
    )
    variables = {variable.name: variable.value for variable in environment(config)}
    return command, variables | secrets_of(config.cluster)


def _this_node(num_nodes: int) -> str:
    """Address and port of a job that has this node alone: nobody else can reach it."""
    from k25_train.errors import ConfigError

    if num_nodes > 1:
        raise ConfigError(
            f"cluster.nodes={num_nodes}: --first-node HOST[:PORT] must say where the nodes meet; or set "
            "cluster.nodes=1"
        )
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return f"{LOOPBACK}:{listener.getsockname()[1]}"


if __name__ == "__main__":
    main()
