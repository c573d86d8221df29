"""What a step waits for gradients and weights of replicas."""

from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.assumptions import Assumptions
from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.data_parallel import chunk_exchange, sent_at_s
from k25_train.plan.time.plan_step import plan_step


def waited_s(config: Config) -> float:
    pipeline = plan_pipeline(config, assumptions=Assumptions(vision_share=0.0))
    return {part.cause: part.seconds for part in plan_step(pipeline).parts}[Cause.data_parallel]


def test_a_pipeline_of_one_waits_for_all_gradients_or_for_those_of_its_first_layer() -> None:
    config = compose(["experiment=moonlight_16b"])
    sizes = replace(config.parallelism, overlap_grad_reduce=False, overlap_param_gather=False)
    pipeline = plan_pipeline(config)
    reduced_s, gathered_s = (chunk_exchange(pipeline, 0, size).seconds for size in (4, 2))
    assert reduced_s == pytest.approx(2 * gathered_s)
    # Nothing runs behind the last pass; the first one shares links with the weights that it waits for.
    assert waited_s(replace(config, parallelism=sizes)) >= reduced_s + gathered_s
    of_a_layer_s = reduced_s / config.model.num_layers
    assert of_a_layer_s <= waited_s(config) < 0.2 * reduced_s


@pytest.mark.parametrize(
    ("begin_s", "seconds", "expected_s"),
    [
        (0.0, 1.0, 2.0),  # within passes, which leave half of the links
        (9.0, 1.0, 10.5),  # half of it while they run, the rest behind them
        (12.0, 1.0, 13.0),  # behind them
    ],
)
def test_what_is_sent_while_passes_run_gets_what_they_leave(
    begin_s: float, seconds: float, expected_s: float
) -> None:
    assert sent_at_s(begin_s, seconds, 10.0, 0.5) == expected_s
