"""Start the ranks of one node by hand, without SLURM: one command per node, identical except for --node.

    python -m launch.torchrun experiment=…    a job of this node alone

    python -m launch.torchrun --node 0 --first-node HOST[:PORT] experiment=… cluster=… cluster.nodes=2
    python -m launch.torchrun --node 1 --first-node HOST[:PORT] experiment=… cluster=… cluster.nodes=2

With --preflight the ranks check their nodes and the connections between them instead of training. One node
needs neither --node nor --first-node.

Checks the configuration, sets the fabric's variables, checks that the first node is this machine (on node 0)
or can be reached (on the others), waits until all nodes are there, and runs torchrun. Ctrl-C, SIGTERM and
SIGUSR1 go to the ranks, which finish their step, save and end.
"""

import argparse
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k25_train.entry import run_command
from k25_train.errors import ConfigError
from k25_train.joining import network
from k25_train.joining.listener import listen_at
from k25_train.joining.network import NetworkError
from launch import rendezvous
from launch.forwarding import run_forwarding
from launch.gathering import Gathering, GatheringError, Node, first_node_at, report

if TYPE_CHECKING:
    from k25_train.config.schema import Config

DEFAULT_PORT, LAST_PORT = 29500, 65535
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which node this is, and where the ranks of all nodes meet."""

    node: int
    address: str
    port: int


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


def _run() -> int:
    # Imported late: launch.node uses `torchrun` on nodes that have the standard library only.
    from k25_train.compose.command_line import read_arguments

    parser = argparse.ArgumentParser(
        prog="python -m launch.torchrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--node", type=int, help="index of this node, from 0")
    parser.add_argument(
        "--first-node", metavar="HOST[:PORT]", help="address of node 0; may be left out for one node"
    )
    parser.add_argument("--preflight", action="store_true", help="check the nodes instead of training")
    arguments = read_arguments(parser)
    module = "launch.preflight" if arguments.preflight else "k25_train.any_run"
    if arguments.node is not None:
        # Reading the configuration takes seconds, on a cold file system more.
        network.say(
            f"node {arguments.node} starts on {network.own_name()}, the first is {arguments.first_node}"
        )
    # Imported late: launch.node uses `torchrun` on nodes that have the standard library only.
    from k25_train.compose.trainable import compose_trainable

    config = compose_trainable(arguments.overrides)
    place = find_place(config, arguments.node, arguments.first_node)
    variables = variables_of(config, os.environ)
    meet(config, place)
    command = start_command(config, place, module, arguments.overrides)
    sys.stdout.flush()
    return run_forwarding(command, variables)


def find_place(config: "Config", node: int | None, first_node: str | None) -> Place:
    """The place of this node.

    Raises `ConfigError` if `node` or `first_node` is missing, `node` is out of range, or `first_node` is not
    an address.
    """
    num_nodes = config.cluster.nodes
    if num_nodes > 1 and (node is None or first_node is None):
        raise ConfigError(
            f"cluster.nodes={num_nodes}: --node and --first-node must be given, on every node another --node"
        )
    node = node or 0
    if not 0 <= node < num_nodes:
        raise ConfigError(f"--node {node}: must be within 0 to cluster.nodes - 1 ({num_nodes - 1})")
    if first_node is None:
        # Nobody else can reach it there.
        with socket.create_server((LOOPBACK, 0)) as listener:
            return Place(node=0, address=LOOPBACK, port=listener.getsockname()[1])
    match = re.fullmatch(r"([^:\s\[\]]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(\d+))?", first_node)
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= LAST_PORT:
        raise ConfigError(
            f"--first-node {first_node}: must be HOST or HOST:PORT, a name, IPv4 address or [IPv6 address], "
            f"and a port within 1 to {LAST_PORT}"
        )
    return Place(node=node, address=match[1].strip("[]"), port=port)


def meet(config: "Config", place: Place, limit_s: float = rendezvous.JOIN_S) -> None:
    """Return once all nodes are there.

    Raises:
        RendezvousError: the first node does not resolve, is another machine (on node 0) or does not answer,
            or its port is taken.
        GatheringError: nodes contradict each other, or some do not come.
    """
    first = f"--first-node {network.endpoint(place.address, place.port)}"
    own = Node(
        node=place.node,
        num_nodes=config.cluster.nodes,
        ranks=config.cluster.gpus_per_node,
        host=network.own_name(),
    )
    remedy = (
        "give every node the same name or address of the machine that runs --node 0, and a port that is free "
        f"there and that no firewall closes: --first-node {place.address}:PORT"
    )
    try:
        network.resolve(place.address)
        if place.node == 0:
            with listen_as_first(place, own) as listener:
                network.check_is_own(place.address, listener)
                Gathering(listener, own, limit_s).run()
            return
        who = f"node {place.node} waits for the first node"
        network.wait_for(place.address, place.port, limit_s, who)
        report(place.address, place.port, own, limit_s)
        network.wait_for(
            place.address, place.port, limit_s, "all nodes are there; waiting for rank 0's torchrun"
        )
    except NetworkError as error:
        raise rendezvous.RendezvousError(f"{first}: {error}: {remedy}") from error


def listen_as_first(place: Place, own: Node) -> socket.socket:
    """Where the first node listens.

    Raises `GatheringError` if another first node listens there, `NetworkError` if another program does.
    """
    try:
        return listen_at(place.address, place.port, is_alone=own.num_nodes == 1)
    except NetworkError:
        other = first_node_at(place.address, place.port)
        if other is None:
            raise
        where = network.endpoint(place.address, place.port)
        raise GatheringError(
            f"--node 0: {other.host} is the first node already, at {where}, of "
            f"cluster.nodes={other.num_nodes}: give this node another --node or, if it is of another job, "
            f"another port (--first-node {place.address}:PORT)"
        ) from None


def variables_of(config: "Config", shell: Mapping[str, str]) -> dict[str, str]:
    """The environment of the ranks, secrets included: what a job script would make of this shell's.

    Prints which variables of the shell the ranks do not get.
    """
    from launch.fabric import environment
    from launch.variables import foreign_in, secrets_of, without_foreign

    own = {variable.name: variable.value for variable in environment(config)} | secrets_of(config.cluster)
    if foreign := foreign_in(shell, own):
        network.say(
            f"not passed on to the ranks: {', '.join(foreign)} of this shell. To set them, on all nodes and "
            f"in jobs of SLURM too, name them in `environment:` of conf/cluster/{config.cluster.name}.yaml"
        )
    return without_foreign(shell) | own


def start_command(config: "Config", place: Place, module: str, overrides: Sequence[str]) -> list[str]:
    """torchrun's command, whose ranks run `module`."""
    return torchrun(
        sys.executable,
        num_nodes=config.cluster.nodes,
        node=place.node,
        ranks=config.cluster.gpus_per_node,
        address=place.address,
        port=place.port,
        command=["-m", module, *overrides],
    )


if __name__ == "__main__":
    main()
