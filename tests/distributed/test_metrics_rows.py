"""What rows tell of a step is the same in every layout; an alarm on the first rank has all ranks save."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from k25_train.metrics.sinks import read_rows
from tests.helpers.parity import NARROW, TOLERANCE
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run
from tests.helpers.trained import trained_vision

pytestmark = pytest.mark.distributed

STEPS = 2
EXACT = (
    "expert_loads expert_load dead_experts expert_bias expert_bias_change batch seq_len padding_share "
    "vision_ratio tokens images source_tokens/text"
).split()
"""Figures of counts, and of biases that move by fixed steps."""
NEAR, FAMILIES = ("loss", "grad_norm", "max_logit"), ("loss/", "grad_norm/", "weight_norm/")
"""Figures that are equal up to the order of sums."""
SHORT = (
    *NARROW, "train.global_batch_size=8", "metrics.weight_norm_interval=2", "optim.qk_clip_threshold=100",
)  # fmt: skip
CASES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "pp2 vpp2 ep2 dp2": ({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, ()),
    "pp2 dp2, frozen tower": ({"pp": 2, "dp": 2}, trained_vision("projector")),
    "cp2 dp2": ({"cp": 2, "dp": 2}, ()),
    "ep2 dp2, frozen language model": (
        {"ep": 2, "dp": 2},
        ("optim.language_model.trained=false", "dep.mode=coupled", "optim.frozen_expert_bias=20"),
    ),
}
SLOW = ("pp2 dp2, frozen tower",)


def rows_of(context: RankContext, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the first steps."""
    from k25_train.training.rows import metrics_row
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        results = [train_step(run, step) for step in range(1, STEPS + 1)]
    return [
        dict(metrics_row(run.config, step, result, is_mixed_anew=False))
        for step, result in enumerate(results, 1)
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_figures_are_those_of_one_process(name: str, data: Path, tmp_path: Path) -> None:
    sizes, more = CASES[name]
    num_ranks = sizes.get("pp", 1) * sizes.get("dp", 1) * sizes.get("cp", 1)
    by_rank = run_ranks(
        rows_of,
        num_ranks,
        overrides(data, tmp_path / "many", *layout(**sizes), *SHORT, *more),
        timeout_s=240.0,
    )
    [serial] = run_ranks(
        rows_of, 1, overrides(data, tmp_path / "one", *layout(), *SHORT, *more), timeout_s=240.0
    )
    for rows in by_rank:
        for found, expected in zip(rows, serial, strict=True):
            assert {key for key in found if "/" in key} == {key for key in expected if "/" in key}
            exact = [key for key in EXACT if key in expected]
            assert {key: found[key] for key in exact} == {key: expected[key] for key in exact}
            near = [key for key in expected if key in NEAR or key.startswith(FAMILIES)]
            assert len(near) > 6
            assert {key: found[key] for key in near} == {
                key: pytest.approx(expected[key], rel=TOLERANCE) for key in near
            }
    norms = {key for key in serial[0] if key.startswith("weight_norm/")}
    assert norms == {f"weight_norm/{part}" for part in ("language_model", "vision_tower", "mm_projector")}
    assert max(serial[0]["expert_loads"]) > 1 and serial[0]["dead_experts"] == 0


def fit_alarmed(context: RankContext, arguments: Sequence[str]) -> None:
    """Train as the command does; the third step of a run is usual, and the loss of the fifth is a spike."""
    from k25_train.metrics import alarms, baseline
    from k25_train.training import trainer

    baseline.NEEDED = 3
    alarms.WARM_UP_STEPS = 99
    row_of = trainer.metrics_row
    trainer.metrics_row = lambda config, step, result, **more: {
        **row_of(config, step, result, **more),
        **({"loss": 50.0} if step == 5 else {}),
    }
    fit(context, arguments)


@pytest.mark.parametrize("saves", [True, False])
def test_an_alarm_saves_where_asked(saves: bool, data: Path, tmp_path: Path) -> None:
    more = (
        "train.steps=7 train.eval_interval=50 checkpoint.interval=50 checkpoint.keep=5 optim.warmup=1 "
        "optim.decay=1 "
        f"metrics.alarms.checkpoint={str(saves).lower()} metrics.alarms.grad_spike=null"
    ).split()
    run_ranks(fit_alarmed, 2, overrides(data, tmp_path, *layout(dp=2), *SHORT, *more), timeout_s=240.0)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "alarm/loss_spike" in row] == [5]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert saved == (["step_5", "step_7"] if saves else ["step_7"])
