"""Returns once so many nodes have joined a Ray cluster, or says how many have not.

python -m launch.ray.ready ADDRESS PORT NODES LIMIT_S
"""

import contextlib
import logging
import socket
import time

from k25_train.entry import run_command
from k25_train.errors import K25Error
from launch import started_by

POLL_S = 0.3


class RayClusterError(K25Error):
    """A Ray cluster is not what it should be."""


def main() -> None:
    """Wait for the nodes."""
    run_command(_run)


def _run() -> None:
    address, port, nodes, limit_s = started_by.arguments("ADDRESS PORT NODES LIMIT_S")
    deadline = time.monotonic() + float(limit_s)
    wanted, found = int(nodes), list[str]()
    import ray

    with contextlib.ExitStack() as stack:
        while len(found) < wanted:
            if time.monotonic() > deadline:
                raise RayClusterError(
                    f"Ray at {address}:{port}: {len(found)} of {wanted} nodes have joined within {limit_s} s "
                    f"({', '.join(found) or 'none'}): see ray.log, whether a firewall closes the port, and "
                    "whether every node can reach the address (cluster.fabric.interface)"
                )
            try:
                if not ray.is_initialized():
                    where = f"{socket.gethostbyname(address)}:{port}"
                    ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
                    stack.callback(ray.shutdown)
            except Exception as error:
                # The head is not there yet; Ray has many names for that.
                found = []
                print(f"waiting for Ray's head: {type(error).__name__}", flush=True)
            else:
                found = [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]]
            time.sleep(POLL_S)


if __name__ == "__main__":
    main()
