"""Runs whose steps last as long as the planner says, given constants that a calibration has to find."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from k25_train.compose.resolve import compose, to_yaml
from k25_train.config.rates import CalibrationConfig
from k25_train.config.schema import Config
from k25_train.plan.calibrate.measured import MeasuredRun, StepGroup
from k25_train.plan.calibrate.planned import planned_s

TRUTH = CalibrationConfig(kernels=1.7342, exchange=3.125, pass_ms=12.63, step_ms=153.7)
SLOW = ("cluster.rates.float32_tflops=0.0004", "cluster.network_gb_per_s=0.01")
"""Passes last a fifth of a second, and messages a share of it that counts."""
CHEAP = ("model.num_layers=4", "optim=adamw", "optim.warmup=1", "optim.decay=1")
"""Planned fast."""


def layout_config(*more: str, pp: int = 1, vpp: int = 1, ep: int = 1, dp: int = 1) -> Config:
    """A shrunk model in a layout of the CPU's."""
    from tests.helpers.runs import layout, overrides

    sizes = layout(pp=pp, vpp=vpp, ep=ep, dp=dp)
    return compose(overrides(Path("shards"), Path("run"), *CHEAP, *SLOW, *sizes, *more))


def planned_run(name: str, config: Config, truth: CalibrationConfig, shares: Sequence[float]) -> MeasuredRun:
    """A run whose groups of steps, by share of images, last what the planner says with these constants."""
    groups = tuple(StepGroup(vision_share=share, num_steps=20, step_s=1.0, noise=0.0) for share in shares)
    run = MeasuredRun(name=name, config=config, groups=groups)
    seconds = planned_s(run, truth)
    return replace(
        run,
        groups=tuple(replace(group, step_s=step_s) for group, step_s in zip(groups, seconds, strict=True)),
    )


def write_run(
    folder: Path, config: Config, truth: CalibrationConfig, *, share: float = 0.2, noise: float = 0.0
) -> Path:
    """The folder of such a run: 24 steps, the first two slow; `noise` is the relative deviation of one."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (step_s,) = (group.step_s for group in planned_run("run", config, truth, [share]).groups)
    draw = np.random.default_rng(len(folder.name))
    rows: list[dict[str, float]] = [{"step": 0, "eval_text_loss": 5.0}]
    for step in range(1, 25):
        seconds = step_s * (1 + noise * float(draw.standard_normal())) + (5.0 if step <= 2 else 0.0)
        waited_s = 0.01 * step
        rows.append(
            {
                "step": step,
                "tokens": 1000,
                "vision_tokens": 1000 * share,
                "step_time_s": seconds + waited_s,
                "data_wait_s": waited_s,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
