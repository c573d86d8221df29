"""The balance loss weighs its coefficient whatever share of the tokens has a loss."""

from pathlib import Path

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed


def scales(context: RankContext, arguments: list[str]) -> tuple[float, float, int]:
    """What a step multiplied the balance loss by; this rank's tokens with a loss, and all but padding."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        batches = run.reader.step(1).micro_batches
        train_step(run, 1)
    pad = run.data.loader.tokenizer.pad
    num_tokens = sum(int((batch.tokens != pad).sum()) for batch in batches)
    with_loss = sum(float(batch.targets.loss_mask.sum()) for batch in batches)
    return float(MoEAuxLossAutoScaler.main_loss_backward_scale), with_loss, num_tokens


def test_every_rank_scales_by_the_share_of_the_global_batch(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(pp=2, dp=2))

    by_rank = run_ranks(scales, 4, arguments)

    used, with_loss, num_tokens = zip(*by_rank, strict=True)
    # Ranks 0 and 1 are replicas of the first stage, which reads no targets; 2 and 3 are those of the last.
    assert with_loss[:2] == (0, 0)
    assert num_tokens[0] != num_tokens[1]
    assert all(number < 4 * 128 for number in num_tokens[:2]), "no sequence has padding"
    share = (with_loss[2] + with_loss[3]) / (num_tokens[0] + num_tokens[1])
    assert used == pytest.approx([share] * 4, rel=1e-6)
