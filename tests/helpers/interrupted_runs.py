"""Short runs that are interrupted and go on: how to start them, cut them off and compare what they wrote."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from k25_train.metrics.sinks import Row, read_rows
from tests.helpers.runs import layout, overrides

ONE_RANK = layout()
FOUR_RANKS = layout(pp=2, vpp=2, ep=2, dp=2)
"""The layout of `experiment=smoke`."""

TOLERANCE = 1e-5
"""Largest relative difference between runs that went on in different layouts."""

_TIMES = (
    "step_time_s",
    "data_wait_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "time_left_s",
    "alarm/throughput",
    "alarm_usual/throughput",
    "vision_work_s_max",
    "vision_work_s_mean",
    "vision_exposed_s_max",
    "checkpoint_stall_s",
    "checkpoint_write_s",
    "checkpoint_bytes",
)


@dataclass(frozen=True, slots=True)
class RunLength:
    """How long a run is, and where it saves: in its middle, and at its end."""

    num_steps: int
    saved_at: int
    warmup_steps: int
    decay_steps: int

    @property
    def overrides(self) -> list[str]:
        """The configuration's keys; evaluations are where checkpoints are, and before the first step."""
        return [
            f"train.steps={self.num_steps}",
            f"train.eval_interval={self.saved_at}",
            f"checkpoint.interval={self.saved_at}",
            f"optim.warmup={self.warmup_steps}",
            f"optim.decay={self.decay_steps}",
        ]


SHORT = RunLength(10, saved_at=5, warmup_steps=2, decay_steps=4)
LONG = RunLength(20, saved_at=10, warmup_steps=4, decay_steps=8)
"""Leaves time to interrupt a run from outside before its checkpoint, and after it before its end."""


def short_run(data: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run as long as `SHORT`, with 4 sequences per step."""
    return _run_of(SHORT, data, run, *more)


def long_run(data: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run as long as `LONG`, with 4 sequences per step."""
    return _run_of(LONG, data, run, *more)


def _run_of(length: RunLength, data: Path, run: Path, *more: str) -> list[str]:
    batch = ("train.global_batch_size=4", "train.eval_sequences=4")
    return overrides(data, run, *length.overrides, *batch, *more)


def cut_off(finished: Path, copy: Path, last: int = SHORT.num_steps) -> Path:
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


def assert_goes_on(resumed: Path, finished: Path, after: int) -> None:
    """Rows up to step `after` are the ones of before; later ones were computed again, bitwise the same."""
    found, expected = rows(resumed), rows(finished)
    assert [row["step"] for row in found] == list(range(len(expected)))
    assert found[: after + 1] == expected[: after + 1], "rows of before the checkpoint were written again"
    assert found[after + 1]["step_time_s"] != expected[after + 1]["step_time_s"], "nothing was trained"
    assert without_times(found) == without_times(expected)


def assert_same_state(resumed: Path, finished: Path) -> None:
    """Weights, masters, moments and buffers at the end are the same bits, tensor by tensor."""
    from k25_train.checkpoint.files.stored import StoredCheckpoint

    last = f"checkpoints/step_{SHORT.num_steps}"
    found, expected = StoredCheckpoint.open(resumed / last), StoredCheckpoint.open(finished / last)
    assert found.tensors == expected.tensors
    assert found.num_updates == expected.num_updates
    assert [name for name in expected.tensors if not found.read(name).equal(expected.read(name))] == []


def assert_close(resumed: Path, finished: Path, after: int) -> None:
    """Losses and gradient norms after step `after` agree to the tolerance."""
    for found, expected in zip(rows(resumed)[after + 1 :], rows(finished)[after + 1 :], strict=True):
        for key in ("loss", "grad_norm", "eval_text_loss", "eval_caption_loss"):
            if key in expected:
                assert found[key] == pytest.approx(expected[key], rel=TOLERANCE), f"{key} at {found['step']}"
