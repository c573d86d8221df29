"""The smoke run against its bars: minutes, memory, and how far the held-out losses fall.

    python -m tests.bench.smoke [overrides …]

Runs the job that `make smoke` runs, in a folder of its own, and watches the memory of all its processes.
Pages that processes share are counted once (proportional set size).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from k25_train.metrics.sinks import read_rows

MAX_MINUTES = 4.0
MAX_GIB = 6.0
MIN_DROP = 0.30
NUM_RANKS = 4


def main() -> None:
    """Run the job and print its figures next to the bars; ends non-zero if one is missed."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak_gib = run_job(Path(folder), sys.argv[1:])
        rows = [row for row in read_rows(Path(folder) / "metrics.jsonl") if "eval_text_loss" in row]
    figures = [
        ("wall time, minutes", seconds / 60, MAX_MINUTES, seconds / 60 <= MAX_MINUTES),
        ("peak memory of all processes, GiB", peak_gib, MAX_GIB, peak_gib <= MAX_GIB),
    ]
    for key in ("eval_text_loss", "eval_caption_loss"):
        drop = 1 - float(rows[-1][key] or 0) / float(rows[0][key] or 1)
        figures.append((f"fall of {key}", drop, MIN_DROP, drop >= MIN_DROP))
    table = Table("", "measured", "bar", "", title=f"smoke run, {NUM_RANKS} ranks")
    for name, measured, bar, kept in figures:
        table.add_row(name, f"{measured:.2f}", f"{bar:.2f}", "kept" if kept else "MISSED")
    Console().print(table)
    sys.exit(not all(kept for *_, kept in figures))


def run_job(folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds that the job took, and the most memory in GiB that its processes had together."""
    command = [sys.executable, "-m", "launch.torchrun"]
    command += ["experiment=smoke", f"run.dir={folder}", *overrides]
    started = time.perf_counter()
    job = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = PeakMemory(job.pid)
    if job.wait() != 0:
        sys.exit(f"the job failed: {' '.join(command)}")
    return time.perf_counter() - started, peak.stop() / 2**30


class PeakMemory:
    """Watches the proportional set size of a process and its children."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End watching; the peak in bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak_bytes

    def _watch(self) -> None:
        while not self._ended.wait(2.0):
            self._peak_bytes = max(self._peak_bytes, self._used_bytes())

    def _used_bytes(self) -> int:
        total = 0
        try:
            for process in [self._root, *self._root.children(recursive=True)]:
                total += process.memory_full_info().pss
        except psutil.Error:
            # A process ended while it was looked at; the next look counts those that are left.
            return 0
        return total


if __name__ == "__main__":
    main()
