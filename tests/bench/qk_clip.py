"""What QK-Clip adds to a step: the largest logits, which need q·k once more, and the clip itself.

    python -m tests.bench.qk_clip [NUM_STEPS]

Trains the smoke model in one process on generated samples, in steps that take turns with QK-Clip off and on,
and compares their medians: what else the machine does hits both alike. For the real model, which runs on
GPUs, it is counted: operations of the second q·k, whose blocks are computed whole, and memory.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.config.parts import EVERY_PART
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.flops import training_flops
from tests.helpers.logits_cost import logits_cost
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, start_run
from tests.helpers.tiny_model import modules_of
from tests.helpers.tiny_shards import write_tiny_shard_set

NUM_STEPS = 24
DOCUMENT_LENGTHS = (4096, 32768, 262144)
MOST_SHARE, MOST_MIB = 0.03, 1.0
"""Bars: operations in those of attention, forward and backward, over the interval; memory of a layer."""


def main() -> int:
    """Print both tables; 1 if a bar is missed."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_STEPS
    with tempfile.TemporaryDirectory() as folder:
        data = write_tiny_shard_set(Path(folder, "shards"))
        command = ["experiment=smoke", *layout(), f"data.dir={data}", f"run.dir={folder}", "optim=muonclip"]
        seconds = run_ranks(times, 1, [*command, "data.max_skipped_samples=0"], num_steps, timeout_s=3600.0)
    off, on = (median(each) for each in seconds[0])
    table = Table("QK-Clip", "seconds a step", "adds", title=f"smoke model, {num_steps} steps each, median")
    table.add_row("off", f"{off:.3f}", "")
    table.add_row("on", f"{on:.3f}", f"{on / off - 1:.1%}")
    Console().print(table)

    return real_model()


def real_model() -> int:
    """The table of the real model; 1 if a bar is missed."""
    config = compose(["experiment=k25_pretrain_4k"])
    interval, shares, memory = config.optim.qk_clip_interval, [], []
    title = f"k25_1t on CUDA, second q·k, every {interval} steps"
    table = Table("tokens a document", "of attention", "of a step", "MiB a layer", "launches", title=title)
    for length in DOCUMENT_LENGTHS:
        cost = logits_cost(config.model, [length])
        step = training_flops(config.model, BatchSizes.of([length], []), EVERY_PART)
        of_step = config.model.num_layers * cost.flops / step / interval
        shares.append(cost.share / interval)
        memory.append(cost.memory_bytes)
        mib = cost.memory_bytes / 2**20
        # The kernel, and the maximum over its blocks.
        table.add_row(f"{length:,}", f"{shares[-1]:.2%}", f"{of_step:.2%}", f"{mib:.2f}", "2")
    Console().print(table)
    share, mib = max(shares), max(memory) / 2**20
    print(
        f"largest logits: {share:.2%} of attention (bar: at most {MOST_SHARE:.0%}), "
        f"{mib:.2f} MiB (bar: at most {MOST_MIB})"
    )
    return int(share > MOST_SHARE or mib > MOST_MIB)


def times(context: RankContext, arguments: Sequence[str], num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with QK-Clip, in turns, after one of each to warm up."""
    from k25_train.optim.qk_clip import NoClip
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    found: tuple[list[float], list[float]] = ([], [])
    with run.data:
        for step in range(1, num_steps + 2):
            # The same batch, so that both do the same work.
            for is_on in (False, True):
                for core in modules_of(run.chunks[0], "DocumentAttention"):
                    core.record_max_logits = is_on
                result = train_step(run if is_on else replace(run, qk_clip=NoClip()), step)
                if step > 1:
                    found[is_on].append(result.step_time_s)
    return found


if __name__ == "__main__":
    sys.exit(main())
