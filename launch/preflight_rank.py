"""Started by srun once per device of every node, before the ranks: runs the preflight in their place.

    python -m launch.preflight_rank ATTEMPT_FOLDER RUN_FOLDER NODE,NODE,... ADDRESS PORT

Rank 0 writes preflight.json to the attempt's folder, and its table to preflight.log.
"""

import os
import runpy
import sys
from pathlib import Path

from k25_train.entry import run_command
from launch import started_by
from launch.node import end_leftovers
from launch.output import keep_limited, redirect
from launch.submission import CONFIG, Submission


def main() -> None:
    """Redirect, then become a rank of the preflight."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    attempt, run, nodes, address, port = started_by.arguments("ATTEMPT_FOLDER RUN_FOLDER NODES ADDRESS PORT")
    folder, submission = Path(attempt), Submission.read(Path(run))
    ranks_per_node = submission.ranks_per_node
    node, local_rank = started_by.number("SLURM_NODEID"), started_by.number("SLURM_LOCALID")
    names = nodes.split(",")
    rank = node * ranks_per_node + local_rank
    log = folder / (f"node_{names[node]}.log" if rank else "preflight.log")
    redirect(log)
    keep_limited(log, submission.max_log_bytes)
    if local_rank == 0:
        end_leftovers(folder.parent, folder.name)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(names) * ranks_per_node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    options = ["--config", str(Path(run) / CONFIG), "--report", str(folder), "--node-names", nodes]
    sys.argv[1:] = [*options, f"cluster.nodes={len(names)}"]
    runpy.run_module("launch.preflight", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
