"""Short runs of the smoke experiment's own model, to compare layouts with one process."""

from pathlib import Path

from tests.helpers.runs import layout

SMOKE_TOLERANCE = 1e-6
"""Largest relative difference of a loss or a gradient norm over 5 steps."""
SMOKE_LAYOUTS = {"pp2 dp2": {"pp": 2, "dp": 2}, "pp2 vpp2 ep2": {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}}


def smoke_overrides(data: Path, folder: Path, **sizes: int) -> list[str]:
    """Overrides of `experiment=smoke` that read the tiny shard set and change nothing of the model."""
    length = ("train.steps=5", "optim.warmup=2", "optim.decay=2", "train.eval_sequences=8")
    files = (f"data.dir={data}", f"run.dir={folder}")
    return ["experiment=smoke", *length, *files, *layout(**sizes)]
