"""Ray on one node, in the foreground; when it ends, or whoever started it, nothing is left of it.

python -m launch.ray.node head|worker ADDRESS PORT
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from k25_train.entry import run_command
from k25_train.errors import ConfigError
from launch import started_by
from launch.forwarding import end_with
from launch.ray.plan import HEAD, WORKER, folder_name, ray_start
from launch.rendezvous import wait_for
from launch.temporary import hold, remove_leftovers

END_S = 10.0
"""Seconds that Ray gets to end."""


def main() -> None:
    """Run Ray on this node until it ends or is told to."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    role, address, port = started_by.arguments("head|worker ADDRESS PORT")
    if role not in (HEAD, WORKER):
        raise ConfigError(f"{role}: must be {HEAD} or {WORKER}\n  -> {started_by.REMEDY}")
    # 1. Files of clusters that were killed go; these are ours as long as this process lives.
    folder = Path(folder_name(port))
    remove_leftovers(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    held = hold(folder)
    # 2. Ray knows addresses only, and tells them to the other nodes.
    try:
        if role == WORKER:
            wait_for(address, int(port))
        command = ray_start(sys.executable, role, socket.gethostbyname(address), port, str(folder))
        return run_until_told(command)
    finally:
        os.close(held)
        remove_leftovers(folder.parent)


def run_until_told(command: list[str]) -> int:
    """Run a command; SIGTERM, SIGINT or SIGHUP, or the death of this process's parent, end it. Its status."""
    told: list[int] = []
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: end_with(signal.SIGTERM),
    )

    def end(number: int, _frame: object) -> None:
        told.append(number)
        child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    end_with(signal.SIGTERM)
    while True:
        try:
            status = child.wait(END_S)
            break
        except subprocess.TimeoutExpired:
            if told:
                child.kill()
    # What it has started may outlive it for a moment.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return 0 if told else status or 1


if __name__ == "__main__":
    main()
