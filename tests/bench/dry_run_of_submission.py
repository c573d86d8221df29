"""Seconds that `launch.slurm --dry-run` takes without torch, next to those of importing hydra alone.

    python -m tests.bench.dry_run_of_submission [NUM_RUNS]

Takes the fastest of a few runs of each: other work on the machine only ever makes them slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

MAX_S = 2.0
NUM_RUNS = 5
HYDRA = "import hydra"
DRY_RUN = (
    "import sys; sys.modules['torch'] = None; from launch.slurm import main; "
    "sys.argv[1:] = ['experiment=k25_pretrain_4k', 'cluster.nodes={nodes}', 'cluster.slurm.min_nodes=32', "
    "'--dry-run']; main()"
)


def main() -> None:
    """Print the figures next to the bar; ends non-zero if it is missed."""
    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_RUNS
    base_s = fastest(HYDRA, num_runs)
    table = Table("", "seconds", "x hydra", "bar", title=f"load average {os.getloadavg()[0]:.1f}")
    table.add_row("import hydra", f"{base_s:.2f}", "1.0", "")
    kept = True
    for nodes in (32, 512):
        seconds = fastest(DRY_RUN.format(nodes=nodes), num_runs)
        kept &= seconds <= MAX_S
        verdict = f"{MAX_S:g} s: {'kept' if seconds <= MAX_S else 'MISSED'}"
        table.add_row(f"dry run, {nodes} nodes", f"{seconds:.2f}", f"{seconds / base_s:.1f}", verdict)
    Console().print(table)
    sys.exit(not kept)


def fastest(code: str, num_runs: int) -> float:
    """Wall time of a Python that runs this code, seconds."""
    times = []
    for _ in range(num_runs):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - started)
        if done.returncode:
            sys.exit(done.stderr)
    return min(times)


if __name__ == "__main__":
    main()
