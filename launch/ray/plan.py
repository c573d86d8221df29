"""Ray's command lines and variables: pure, and the same on this machine and in a job.

    head      on the first node, at its address and a port that is free there
    worker    on every other one
    ready     on the first one: returns once all have joined

Ray has processors alone: ranks and engines have the accelerators. Whoever joins needs a token from a file.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from launch.srun import python, srun
from launch.submission import Submission

STORE_BYTES = 256 * 2**20
"""Ray's object store of a node. Records go over sockets of their own, so little is in it. Our choice."""
START_S = 180.0
"""Longest time until all nodes have joined; a cold file system takes minutes to load Ray."""
HEAD, WORKER = "head", "worker"
TOKEN_FILE = "ray_token"
"""Its name in the run folder, which all nodes see."""
LOG = "ray.log"
ADDRESS = "RAY_ADDRESS"


class Step(NamedTuple):
    """Processes of Ray that start and end together."""

    name: str
    """For people."""
    command: Sequence[str]
    """Stays in the foreground as long as they live."""


class Place(NamedTuple):
    """Where Ray's head listens."""

    address: str
    """A name or an address."""
    port: str


class Plan(NamedTuple):
    """What makes a cluster."""

    steps: Sequence[Step]
    """The head first."""
    ready: Sequence[str]
    """Command that succeeds once all nodes have joined."""
    num_nodes: int


def ray_start(interpreter: str, role: str, address: str, port: str, folder: str) -> list[str]:
    """Ray's own command on a node; `folder`: for its sockets and logs."""
    # Only a head says where it is and where files are: the others learn it from there.
    place = [f"--address={address}:{port}"]
    if role == HEAD:
        place = [
            "--head", f"--node-ip-address={address}", f"--port={port}", "--include-dashboard=false",
            f"--temp-dir={folder}",
        ]  # fmt: skip
    return [
        interpreter, "-m", "ray.scripts.scripts", "start", *place,
        "--num-gpus=0", f"--object-store-memory={STORE_BYTES}",
        # Ports that the kernel gives: a fixed range would be another job's as well.
        "--min-worker-port=0", "--max-worker-port=0",
        "--disable-usage-stats", "--log-color=false", "--block",
    ]  # fmt: skip


def here(interpreter: str, place: Place) -> Plan:
    """A cluster of this machine alone."""
    where = [place.address, place.port]
    head = Step("this machine", [interpreter, "-m", "launch.ray.node", HEAD, *where])
    return Plan([head], [interpreter, "-m", "launch.ray.ready", *where, "1", f"{START_S:g}"], 1)


def of_job(submission: Submission, nodes: Sequence[str], place: Place) -> Plan:
    """A cluster of a job's nodes, spare ones too, by srun."""
    first, others = nodes[:1], nodes[1:]
    # One node that is lost, or whose Ray ends, takes none of the others with it.
    alone = ["--no-kill", "--kill-on-bad-exit=0"]

    def step(where: Sequence[str], role: str) -> list[str]:
        module = ["launch.ray.node", role, *place]
        return [*srun(submission, where), *alone, *python(submission), *module]

    steps = [Step(first[0], step(first, HEAD))]
    if others:
        steps.append(Step(",".join(others), step(others, WORKER)))
    ready = ["launch.ray.ready", *place, str(len(nodes)), f"{START_S:g}"]
    return Plan(steps, [*srun(submission, first), *python(submission), *ready], len(nodes))


def variables(token_file: str) -> dict[str, str]:
    """What Ray's own processes and all that use them have in common."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token_file,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Seconds that a node which is told to end would wait for what it runs.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def without_ray(shell: Mapping[str, str]) -> dict[str, str]:
    """A shell's variables without Ray's, which may speak of another cluster."""
    return {name: value for name, value in shell.items() if not name.startswith("RAY_")}


def folder_name(port: str) -> str:
    """The folder of a cluster's files on a node: sockets' paths may have 107 bytes, so it is short.

    It is called as what `launch.temporary` removes when nobody uses it any more.
    """
    return f"/tmp/.k25_ranks_ray_{os.getuid()}_{port}"
