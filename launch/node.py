"""What srun starts on every node: clears the node of an earlier attempt, meets the others, becomes torchrun.

python -m launch.node RUN_FOLDER ATTEMPT NUM_NODES ADDRESS PORT
"""

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from launch import rendezvous
from launch.output import redirect
from launch.submission import CONFIG, Submission
from launch.torchrun import torchrun

_SIGNAL_WHEN_PARENT_DIES = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def main() -> None:
    """Become torchrun."""
    run, attempt, num_nodes, address, port = sys.argv[1:]
    submission, node = Submission.read(Path(run)), int(os.environ["SLURM_NODEID"])
    attempts = Path(run) / "attempts"
    redirect(attempts / attempt / f"node_{os.environ['SLURMD_NODENAME']}.log")
    end_leftovers(attempts, attempt)
    try:
        if node:
            rendezvous.wait_for(address, int(port))
        else:
            rendezvous.free_port([int(port)])
    except rendezvous.RendezvousError as error:
        sys.exit(str(error))
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
    prepare_signals()
    os.execv(sys.executable, [*command[:3], "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *command[3:]])


def prepare_signals() -> None:
    """Let SIGTERM and SIGUSR1 pass torchrun by, and let it end when SLURM's own process on this node does.

    SLURM sends a step's signals to every process of it, so the ranks get them, save and stop. torchrun would
    kill them 30 s later, whatever they do, and itself ends at once of SIGUSR1.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, signal.SIGINT)


def end_leftovers(attempts: Path, attempt: str) -> None:
    """Kill what an earlier attempt of the same run left on this node, where SLURM lost track of it.

    Its ranks would save into the folder that this attempt writes.
    """
    for pid, earlier in ranks_of(attempts):
        if earlier != attempt:
            print(f"{socket.gethostname()}: ending process {pid}, left by attempt {earlier}", flush=True)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def ranks_of(attempts: Path) -> Iterator[tuple[int, str]]:
    """Process and attempt of everything on this node that was started for this run."""
    root, run = (re.escape(os.fsencode(folder)) for folder in (attempts, attempts.parent))
    # The last is one that waits for the first node still: it would join the next attempt in another's place.
    mark = re.compile(rb"\0launch\.(?:(?:rank|preflight_rank)\0%b/|node\0%b\0)(\d+)\0" % (root, run))
    for entry in Path("/proc").iterdir():
        try:
            found = mark.search((entry / "cmdline").read_bytes()) if entry.name.isdigit() else None
        except OSError:
            # It has ended, or is not ours.
            continue
        if found:
            yield int(entry.name), found[1].decode()


if __name__ == "__main__":
    main()
