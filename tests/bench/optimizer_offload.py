"""How long the host's optimizer step takes: DeepSpeed's CPU Adam, torch's AdamW, and the memory's pace.

    OMP_NUM_THREADS=2 python -m tests.bench.optimizer_offload [parameters]

A step reads master, gradient and both moments and writes all but the gradient: 28 bytes a parameter in
float32. It is held against that many bytes at the bandwidth of `a += b`, which writes only what it has read,
as the step does. (A copy is no measure: for what it writes, memory is read as well, and not counted.) With
one thread the step can be the faster of the two, for it reads more streams at once. Rounds of all kernels
alternate and the fastest counts: other work on the machine slows single rounds down.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from k25_train.optim.cpu_adam import CpuAdamW
from k25_train.startup.quiet import quiet_libraries

BYTES_PER_PARAMETER = 28
REPEATS = 15


def fastest_s(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest call of each, in rounds over all, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(REPEATS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: min(found) for name, found in times.items()}


def stepper(build: Callable[[list[dict]], torch.optim.Optimizer], num: int) -> Callable[[], object]:
    """A step over `num` parameters in ten tensors."""
    weights: list[Tensor] = [torch.ones(num // 10) for _ in range(10)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    group = {"params": weights, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return build([group]).step


def main() -> None:
    """Measure and print a table."""
    quiet_libraries()
    num = int(float(sys.argv[1])) if len(sys.argv) > 1 else 50_000_000
    kernels = {
        "DeepSpeed's CPU Adam": CpuAdamW,
        "torch's AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
        "torch's AdamW": lambda groups: torch.optim.AdamW(groups, fused=False),
    }
    here, there = torch.ones(num), torch.zeros(num)
    runs = {name: stepper(build, num) for name, build in kernels.items()}
    times = fastest_s({**runs, "a += b": lambda: here.add_(there)})
    bandwidth = 3 * here.nbytes / times.pop("a += b")
    expected = BYTES_PER_PARAMETER * num / bandwidth
    title = f"{num / 1e6:g}M parameters, {torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s"
    table = Table("step", "ms", "ratio to DeepSpeed's", "bandwidth over that of a += b", title=title)
    for name, seconds in times.items():
        ratio = seconds / times["DeepSpeed's CPU Adam"]
        table.add_row(name, f"{seconds * 1e3:.0f}", f"{ratio:.2f}", f"{expected / seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
