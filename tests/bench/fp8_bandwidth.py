"""How much of the memory's bandwidth FP8 storage reaches: the kernels on a GPU, else the twin on the CPU.

    python -m tests.bench.fp8_bandwidth [rows]

A pass reads the tensor and writes values and scales, or the other way round. Those bytes over its time are
held against a copy of the same tensor in the same run, which reads and writes it once. Rounds of all
alternate and the fastest counts: other work on the machine slows single rounds down. Sizes are Kimi K2.5's:
the input of an expert's up-projection (7168), and of its SwiGLU (2 * 2048).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from parallel.activations.fp8 import compress, decompress
from parallel.activations.sizes import fp8_bytes

HIDDEN_SIZES = (7168, 4096)
ROUNDS = 20


def gpu_s(run: Callable[[], object]) -> float:
    """Seconds between two marks in the device's stream; what the host takes to launch is hidden by a wait."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10**6)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cpu_s(run: Callable[[], object]) -> float:
    """Seconds on the clock."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def fastest_s(runs: dict[str, Callable[[], object]], seconds: Callable[..., float]) -> dict[str, float]:
    """Seconds of the fastest call of each, in rounds over all, after one that does not count."""
    for run in runs.values():
        run()
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in runs}


def main() -> None:
    """Measure and print a table."""
    cuda = torch.cuda.is_available()
    # Beyond the caches of either.
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else (65536 if cuda else 4096)
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    table = Table("rows x hidden", "pass", "GB/s", "ratio to a copy's", title=f"bfloat16 in FP8 on {device}")
    for hidden in HIDDEN_SIZES:
        tensor = torch.randn(num_rows, hidden, dtype=torch.bfloat16, device="cuda" if cuda else "cpu")
        there, stored = torch.empty_like(tensor), compress(tensor)
        times = fastest_s(
            {
                "copy": lambda there=there, tensor=tensor: there.copy_(tensor),
                "compress": lambda tensor=tensor: compress(tensor),
                "decompress": lambda stored=stored: decompress(stored),
            },
            gpu_s if cuda else cpu_s,
        )
        moved = tensor.nbytes + fp8_bytes(tensor.shape)
        copied = 2 * tensor.nbytes / times.pop("copy")
        table.add_row(f"{num_rows} x {hidden}", "copy", f"{copied / 1e9:.3g}", "1")
        for name, taken in times.items():
            rate = moved / taken
            table.add_row("", name, f"{rate / 1e9:.3g}", f"{rate / copied:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
