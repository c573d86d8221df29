"""Short runs that are interrupted and go on: how to start them, cut them off and compare what they wrote."""

import shutil
from pathlib import Path

from k25_train.metrics.sinks import Row, read_rows
from tests.helpers.runs import layout, overrides

ALONE = layout()
AS_SMOKE = layout(pp=2, vpp=2, ep=2, dp=2)
"""The layout of `experiment=smoke`, 4 ranks."""

MIDDLE, LAST = 10, 20
"""Steps of the checkpoints of a run that was not interrupted."""

_TIMES = ("step_time_s", "tokens_per_s", "vision_work_s_max", "vision_work_s_mean", "vision_exposed_s_max")


def short(data: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run of 20 steps of 4 sequences, with evaluations at 0, 10 and 20."""
    return overrides(data, run, "train.global_batch_size=4", "train.eval_sequences=4", *more)


def cut_off(finished: Path, copy: Path, last: int = LAST) -> Path:
    """The folder as it was if the run had been killed after step `last`, before that checkpoint was whole."""
    shutil.copytree(finished, copy)
    checkpoints = copy / "checkpoints"
    (checkpoints / f"step_{last}").rename(checkpoints / f"step_{last}.partial")
    (checkpoints / f"step_{last}.partial/manifest.json").unlink()
    return copy


def rows(run: Path) -> list[Row]:
    """The run's metrics."""
    return read_rows(run / "metrics.jsonl")


def without_times(metrics: list[Row]) -> list[Row]:
    """All but how long it took, which two runs never agree on."""
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in metrics]
