"""What QK-Clip adds to a step: the largest logits, which need q·k once more, and the clip itself.

    python -m tests.bench.qk_clip [NUM_STEPS]

Trains the smoke model in one process on generated samples, in steps that take turns with QK-Clip off and on,
and compares their medians: what else the machine does hits both alike. For the real model, which runs on
GPUs, the share is counted in FLOPs: of the second q·k, whose blocks on the diagonal are computed whole, in
all of a step.
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
from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import TrainedVision
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.flops import training_flops
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, start_run
from tests.helpers.tiny_model import modules_of
from tests.helpers.tiny_shards import write_tiny_shard_set

NUM_STEPS = 24
DOCUMENT_LENGTHS = (4096, 32768, 262144)


def main() -> None:
    """Print both tables."""
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

    table = Table("tokens a document", "share of a step's FLOPs", title="k25_1t, second q·k")
    for length, share in run_ranks(shares_of_flops, 1)[0].items():
        table.add_row(f"{length:,}", f"{share:.2%}")
    Console().print(table)


def shares_of_flops(_context: RankContext) -> dict[int, float]:
    """Tokens of a document -> the recording's share of a step's FLOPs, for the real model."""
    model = compose(["experiment=k25_pretrain_4k"]).model
    return {
        length: recording_flops(model, length)
        / training_flops(model, BatchSizes.of([length], []), TrainedVision.all)
        for length in DOCUMENT_LENGTHS
    }


def recording_flops(model: ModelConfig, length: int) -> int:
    """Operations of q·k over one document as `max_logits_per_head` computes it, all layers."""
    from k25_train.model.max_logits import QUERY_BLOCK

    blocks = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    num_pairs = sum((stop - start) * stop for start, stop in zip([0, *blocks], blocks, strict=False))
    return 2 * num_pairs * model.num_layers * model.num_attention_heads * model.q_head_dim


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
    main()
