"""How fast a run went: model TFLOP/s and tokens/s of a GPU, next to published figures.

    python -m tests.bench.throughput RUN_FOLDER

Reads `config.yaml` and `metrics.jsonl` of the folder. The step is the median one, without the first, which
builds kernels and fills caches. FLOPs are the model's (`k25_train/plan/flops.py`): causal attention counts
half, what is computed again does not count. Published figures count alike: 386.6 TFLOP/s at 22,528 tokens/s
are 17.16 GFLOPs a token, and `model=moonlight_16b` has 17.17 on documents of 4,096 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from k25_train.compose.resolve import load, to_yaml
from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.run_folder.rows_file import METRICS_FILE, Row, number, read_rows

CARDS = "NVIDIA Megatron-Bridge at 067f987, examples/model_verification_cards"


@dataclass(frozen=True, slots=True)
class Published:
    """A figure of others."""

    model: str
    hardware: str
    tflops: float
    """Model TFLOP/s of a GPU."""
    tokens_per_s: float
    """Of a GPU."""
    setting: str
    source: str


PUBLISHED = (
    Published(
        "Moonlight-16B-A3B",
        "16 H100, BF16",
        386.59,
        22528.026,
        "TP1 PP1 EP8, 1024 sequences of 4096 in micro-batches of 2, HybridEP on 32 SMs, all overlapped, "
        "weight gradients delayed, nothing recomputed, AdamW with bfloat16 gradients and moments, natural "
        "routing; "
        "mean of the last 10 of 100 steps; the card says: not tuned",
        f"{CARDS}/moonlight-16b-a3b, 2026-07-22",
    ),
    Published(
        "DeepSeek-V3",
        "1024 H100, BF16",
        276.03,
        1061.206,
        "TP2 PP8 VPP4 EP64, 16384 sequences of 4096, with multi-token prediction",
        f"{CARDS}/deepseek-v3",
    ),
    Published(
        "Kimi K2",
        "256 GB300, MXFP8",
        1099.0,
        5372.0,
        "TP1 PP4 VPP4 EP64, 4096 sequences of 4096 in micro-batches of 2, Muon, mock data, forced balance",
        "NVIDIA Megatron-Bridge at 067f987, docs/performance-summary-archive.md",
    ),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """The steady steps of a run; per rank, which is a GPU or a process."""

    num_steps: int
    """Steps that were measured."""
    step_s: float
    """The median step."""
    tflops: float
    tokens_per_s: float
    flops_per_token: float


def speed_of(rows: Sequence[Row], num_ranks: int) -> Speed:
    """The median of every figure over the steps after the first. Raises `ConfigError` if there is none."""
    steps = [row for row in rows if "step_time_s" in row and "flops" in row]
    steady = [row for row in steps if row["step"] != steps[0]["step"]]
    if not steady:
        raise ConfigError(
            f"{len(steps)} steps have been measured, and the first is left out: train at least 2, better 20"
        )

    def middle(key: str, over: str) -> float:
        return median(number(row[key]) / number(row[over]) for row in steady)

    return Speed(
        num_steps=len(steady),
        step_s=median(number(row["step_time_s"]) for row in steady),
        tflops=middle("flops", "step_time_s") / num_ranks / 1e12,
        tokens_per_s=middle("tokens", "step_time_s") / num_ranks,
        flops_per_token=middle("flops", "tokens"),
    )


def told(config: Config, speed: Speed) -> list[str]:
    """The lines below the configuration; the figures come last."""
    is_gpu = config.cluster.device is Device.cuda
    unit = "GPU" if is_gpu else "process"
    product = config.cluster.gpu.model if config.cluster.gpu is not None else config.cluster.device.value
    lines = ["published, per GPU:"]
    for each in PUBLISHED:
        figures = f"{each.tflops:,.1f} TFLOP/s, {each.tokens_per_s:,.0f} tokens/s"
        lines += [
            f"  {each.model} on {each.hardware}: {figures}",
            f"    {each.setting}",
            f"    {each.source}",
        ]
    lines.append(
        f"this run: {config.model.name}, {config.world_size} x {product}, {config.train.dtype.value}, "
        f"median of {speed.num_steps} steps: {speed.step_s:.3f} s, "
        f"{speed.flops_per_token / 1e9:,.2f} GFLOPs a token"
    )
    if not is_gpu:
        lines.append("no comparison: these ranks are CPU processes, the published ones GPUs")
    lines.append(f"{speed.tflops:,.6g} model TFLOP/s and {speed.tokens_per_s:,.0f} tokens/s per {unit}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Print it; 1 if the folder holds no run that can be measured, 2 without one folder."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    folder = Path(arguments[0])
    try:
        config = load(folder / "config.yaml").config
        rows = read_rows(folder / METRICS_FILE)
        speed = speed_of(rows, config.world_size)
    except (K25Error, OSError) as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return 1
    print(to_yaml(config))
    print("\n".join(told(config, speed)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
