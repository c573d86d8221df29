"""A run with zero vision says of every step that no pixel was read; the same counter counts in other runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parity import NARROW
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.trained import trained_vision

pytestmark = pytest.mark.distributed

SHORT = (*NARROW, "train.global_batch_size=4")


def steps_of(context: RankContext, arguments: Sequence[str]) -> list[tuple[int, int, Any, float]]:
    """Of two steps with an evaluation between: pixels read, patches of the batch, what the row says of
    pixels, and how far the parameters of tower and projector have moved."""
    from k25_train.training.rows import metrics_row
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    found = []
    vision = [
        parameter
        for replica in run.tower.replicas
        for parameter in replica.parameters()
    ]  # fmt: skip
    before = [each.detach().clone() for each in vision]
    with run.data:
        for step in (1, 2):
            result = train_step(run, step)
            row = metrics_row(run.config, step, result, is_mixed_anew=False)
            moved = sum(float((now - then).abs().sum()) for now, then in zip(vision, before, strict=True))
            found.append((result.pixels_read, result.sizes.num_patches, row.get("pixels_read"), moved))
    return found


def test_no_pixel_is_read_and_no_part_of_vision_moves(data: Path, tmp_path: Path) -> None:
    more = (*SHORT, *mix(text=1.0), "data.zero_vision=true", *trained_vision("nothing"))
    for found in run_ranks(steps_of, 2, overrides(data, tmp_path, *layout(dp=2), *more), timeout_s=240.0):
        assert found == [(0, 0, 0, 0.0)] * 2


def test_the_same_counter_counts_where_there_are_images(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(dp=2), *SHORT, "data.read_in=process")
    one, other = run_ranks(steps_of, 2, arguments, timeout_s=240.0)
    assert [each[:3] for each in one] == [each[:3] for each in other]
    for pixels, patches, told, _ in one:
        # Each patch of the batch is decoded by one rank; 14 x 14 pixels.
        assert pixels == patches * 14 * 14 > 0
        assert told is None
