"""Started by srun on every node: kills leftovers of earlier attempts, then becomes torchrun.

python -m launch.node RUN_FOLDER ATTEMPT NUM_NODES ADDRESS PORT
"""

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from k25_train.entry import run_command
from launch import rendezvous, started_by
from launch.ends import log_of as ends_file
from launch.forwarding import hang_up_with_parent
from launch.output import LIMIT, LOGS, redirect
from launch.submission import CONFIG, Submission
from launch.torchrun import torchrun


def main() -> None:
    """Prepare the node, then become torchrun."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    run, attempt, num_nodes, address, port = started_by.arguments("RUN_FOLDER ATTEMPT NUM_NODES ADDRESS PORT")
    submission, node = Submission.read(Path(run)), started_by.number("SLURM_NODEID")
    attempts = Path(run) / "attempts"
    # 1. Clear the node: everything printed from here on goes to its log.
    own_log = attempts / attempt / f"node_{started_by.variable('SLURMD_NODENAME')}.log"
    redirect(own_log)
    end_leftovers(attempts, attempt)
    # 2. The port must be free on the first node, and reachable from the others.
    if node:
        rendezvous.wait_for(address, int(port))
    else:
        rendezvous.free_port([int(port)])
    # 3. torchrun takes the place of this process, with signals set for the ranks.
    ranks = ["-m", "launch.rank", str(attempts / attempt), "--config", str(Path(run) / CONFIG)]
    command = torchrun(
        sys.executable,
        num_nodes=int(num_nodes),
        node=node,
        ranks=submission.ranks_per_node,
        address=address,
        port=int(port),
        command=[*ranks, f"cluster.nodes={num_nodes}"],
    )
    # It keeps the logs of this node within their limit.
    first_rank = node * submission.ranks_per_node
    logs = [attempts / attempt / f"rank_{first_rank + n}.log" for n in range(submission.ranks_per_node)]
    os.environ[LIMIT] = str(submission.max_log_bytes)
    os.environ[LOGS] = os.pathsep.join(map(str, [own_log, *logs]))
    prepare_signals()
    ends = f"--ends={ends_file(attempts / attempt, started_by.variable('SLURMD_NODENAME'))}"
    os.execv(sys.executable, [*command[:3], ends, "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *command[3:]])


def prepare_signals() -> None:
    """Have torchrun ignore SIGTERM and SIGUSR1, and end when SLURM's own process on this node ends.

    SLURM signals every process of a step, so the ranks receive both signals themselves, save and stop.
    torchrun would kill them 30 s later regardless, and would itself die at once from SIGUSR1.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Not SIGINT, on which ranks would save, when those of other nodes are ended already.
    hang_up_with_parent()


def end_leftovers(attempts: Path, attempt: str) -> None:
    """Kill processes of earlier attempts of this run that SLURM lost track of on this node.

    Their ranks would save into the folder that this attempt writes to.
    """
    for pid, earlier in ranks_of(attempts):
        if earlier != attempt:
            print(f"{socket.gethostname()}: ending process {pid}, left by attempt {earlier}", flush=True)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def ranks_of(attempts: Path) -> Iterator[tuple[int, str]]:
    """Process id and attempt of every process on this node that was started for this run."""
    root, run = (re.escape(os.fsencode(folder)) for folder in (attempts, attempts.parent))
    # A `launch.node` still waiting for the first node would join the next attempt in another's place.
    mark = re.compile(rb"\0launch\.(?:(?:rank|preflight_rank)\0%b/|node\0%b\0)(\d+)\0" % (root, run))
    for entry in Path("/proc").iterdir():
        try:
            found = mark.search((entry / "cmdline").read_bytes()) if entry.name.isdigit() else None
        except OSError:
            # The process has ended or belongs to another user.
            continue
        if found:
            yield int(entry.name), found[1].decode()


if __name__ == "__main__":
    main()
