"""What a plan assumes of the data: what the configuration says of them, as far as it does."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.assumptions import VISION_SHARE
from k25_train.plan.pipeline import plan_pipeline


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        # Kinds are drawn by weight, so how many tokens are images' is not known before they are read.
        (["experiment=smoke"], VISION_SHARE),
        (["experiment=k25_pretrain_4k"], 0.1),
        (["experiment=k25_pretrain_4k", "data.vision_ratio=0.3"], 0.3),
        (["experiment=moonlight_16b"], 0.0),
        (["experiment=smoke", "data=smoke_text"], 0.0),
    ],
)
def test_the_share_of_vision_tokens_is_that_of_the_data(overrides: list[str], share: float) -> None:
    assert plan_pipeline(compose(overrides)).assumptions.vision_share == share


def test_of_a_schedule_the_largest_share_counts() -> None:
    later = (
        "data.schedule={more: {from_step: 100, vision_ratio: 0.5}, less: {from_step: 200, vision_ratio: 0.2}}"
    )
    config = compose(["experiment=k25_pretrain_4k", later])
    assert plan_pipeline(config).assumptions.vision_share == 0.5
