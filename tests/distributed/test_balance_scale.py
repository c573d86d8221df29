"""The balance loss weighs its coefficient whatever share of the tokens has a loss."""

from pathlib import Path

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed


def scales(context: RankContext, arguments: list[str]) -> tuple[float, float]:
    """What a step multiplied the balance loss by, and the share of this rank's tokens that had a loss."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.loader:
        masks = [batch.targets.loss_mask for batch in run.reader.step(1).micro_batches]
        train_step(run, 1)
    share = sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    return float(MoEAuxLossAutoScaler.main_loss_backward_scale), share


def test_every_rank_scales_by_the_share_of_the_global_batch(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(pp=2, dp=2))

    by_rank = run_ranks(scales, 4, arguments)

    used, shares = zip(*by_rank, strict=True)
    # Ranks 0 and 1 are the two replicas of the first stage.
    assert shares[0] != shares[1]
    assert used == pytest.approx([(shares[0] + shares[1]) / 2] * 4, rel=1e-6)
