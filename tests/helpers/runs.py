"""Short training runs of a shrunk model on a tiny shard set, in any layout."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.ranks import RankContext, run_ranks

SHRUNK = (
    "experiment=smoke model.hidden_size=64 model.num_attention_heads=2 model.q_lora_rank=32 "
    "model.kv_lora_rank=16 model.dense_ffn_hidden_size=96 model.expert_ffn_hidden_size=32 "
    "model.num_layers=5 model.num_experts=4 model.vocab_size=320 model.init_std=0.05 "
    "model.vision.hidden_size=32 model.vision.num_attention_heads=2 model.vision.ffn_hidden_size=64 "
    "model.vision.num_layers=2 model.vision.image_patch_limit=64 model.vision.frame_patch_limit=16 "
    "train.seq_len=128 train.global_batch_size=8 train.micro_batch_size=1 train.steps=20 "
    "train.eval_interval=10 train.eval_sequences=8 optim.lr=5e-3 optim.min_lr=2e-4 optim.warmup=4 "
    "optim.decay=8 "
    "checkpoint.interval=10 data.max_skipped_samples=0 data.read_in=thread"
).split()
"""Overrides of `experiment=smoke` that make a step take a fraction of a second."""


def layout(pp: int = 1, vpp: int = 1, ep: int = 1, dp: int = 1, cp: int = 1) -> list[str]:
    """Overrides for a parallel layout of pp * dp * cp ranks."""
    sizes = {"pp": pp, "vpp": vpp, "ep": ep, "cp": cp}
    return [f"parallelism.{name}={size}" for name, size in sizes.items()] + [
        f"cluster.gpus_per_node={pp * dp * cp}"
    ]


def overrides(data: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a shrunk run on the shard set `data` that writes into `run`."""
    return [*SHRUNK, f"data.dir={data}", f"run.dir={run}", *more]


def start_run(context: RankContext, arguments: Sequence[str]) -> Any:
    """Build the run of these overrides on a test rank."""
    return start_run_on(context, arguments, None)


def start_run_on(context: RankContext, arguments: Sequence[str], source: Any) -> Any:
    """The same with data of `source`, from a configuration; None for those of `start_source`."""
    os.environ.update(context.environment())
    from k25_train.compose.resolve import compose
    from k25_train.startup.determinism import prepare_determinism
    from parallel.megatron.platform import use_platform

    config = compose(arguments)
    from k25_train.data.start import start_source
    from parallel.context import shares

    # Documents of tests are short; of ranks that share them, each gets pieces all the same.
    shares.MIN_PIECE_TOKENS = 8

    data = (source or start_source)(config)
    prepare_determinism(config.train, config.cluster)
    device = use_platform(config.cluster.device.value)
    from k25_train.training.run import build_run

    return build_run(config, device, data)


def train(context: RankContext, arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run without checkpoints."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        results = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
    return [(result.loss, result.grad_norm) for result in results]


def fit(context: RankContext, arguments: Sequence[str]) -> None:
    """Train as the command does: metrics, evaluations, checkpoints, resume."""
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    report = Report(run.config, is_main=run.is_main, device_name=run.topology.device.type)
    with report, run.data, run.claim:
        Trainer(run, report).fit()


def losses_of(arguments: Sequence[str], num_ranks: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; the same on every rank, which is checked."""
    by_rank = run_ranks(train, num_ranks, list(arguments), timeout_s=240.0)
    assert all(losses == by_rank[0] for losses in by_rank), "ranks report different losses"
    return by_rank[0]
