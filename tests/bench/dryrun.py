"""The dry run of the 1T model against its bars: seconds of the whole command, and memory.

    python -m tests.bench.dryrun [NUM_RUNS]

Runs the command a few times for 256 and for 4,096 ranks and takes the fastest: other work on the machine only
ever makes it slower. Memory is the largest resident set of any of the processes so far.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

MAX_GIB = 4.0
NODES_AND_MAX_S = ((32, 15.0), (512, 60.0))
NUM_RUNS = 3


def main() -> None:
    """Print the figures next to the bars; ends non-zero if one is missed."""
    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_RUNS
    figures = []
    for nodes, max_s in NODES_AND_MAX_S:
        seconds = min(run_command(nodes) for _ in range(num_runs))
        figures.append((f"{nodes * 8:,} ranks, seconds", seconds, max_s))
        peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        figures.append((f"{nodes * 8:,} ranks, peak memory in GiB", peak_gib, MAX_GIB))
    title = f"dry run of k25_pretrain_4k, fastest of {num_runs}; load average {os.getloadavg()[0]:.1f}"
    table = Table("", "measured", "bar", "", title=title)
    for name, measured, bar in figures:
        table.add_row(name, f"{measured:.2f}", f"{bar:.2f}", "kept" if measured <= bar else "MISSED")
    Console().print(table)
    sys.exit(not all(measured <= bar for _, measured, bar in figures))


def run_command(nodes: int) -> float:
    """Wall time of the whole command, seconds."""
    line = [sys.executable, "-m", "k25_train.dryrun", "experiment=k25_pretrain_4k", f"cluster.nodes={nodes}"]
    started = time.perf_counter()
    done = subprocess.run(
        line, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stderr}")
    return seconds


if __name__ == "__main__":
    main()
