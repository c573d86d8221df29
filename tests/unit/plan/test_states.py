"""What ranks keep from step to step: buffers and shards as megatron-core makes them."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.compose.resolve import compose
from k25_train.plan.assumptions import Assumptions, OtherCode, Sharding
from k25_train.plan.memory.buffers import bucket_elements, plan_buffer
from k25_train.plan.memory.states import pipeline_states
from k25_train.plan.pipeline import plan_pipeline
from tests.helpers.trained import trained_vision

BUCKETS = (None, 1, 500, 4000)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    num_shards=st.sampled_from([1, 2, 3, 16, 48]),
    bucket_size=st.sampled_from(BUCKETS),
)
def test_buffers_are_megatron_cores(sizes: list[int], num_shards: int, bucket_size: int | None) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    how = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    real = DistributedOptimizer._compute_per_buffer_param_layout(parameters, bucket_size, num_shards, how)
    planned = plan_buffer(sizes, num_shards, bucket_size)
    assert list(planned.buckets) == real.bucket_indices
    assert list(planned.ranges) == [place[:2] for place in real.param_index_map.values()]
    # Element by element: which rank updates it, and of which parameter it is.
    for shard, (elements, parts) in enumerate(planned.shards()):
        held = set()
        for number, (start, end) in enumerate(planned.ranges):
            first, last = next(each for each in planned.buckets if each[0] <= start and end <= each[1])
            size = (last - first) // num_shards
            own = range(max(start, first + shard * size), min(end, first + (shard + 1) * size))
            held |= {(number, element) for element in own}
        assert (elements, parts) == (len(held), len({number for number, _ in held}))


def test_buckets_grow_with_ranks() -> None:
    assert (bucket_elements(16), bucket_elements(256)) == (40_000_000, 256_000_000)


def test_the_code_of_others_keeps_other_states() -> None:
    config = compose(["experiment=k25_pretrain_4k", "optim=adamw", "dep.mode=coupled"])
    ours, half = (
        pipeline_states(plan_pipeline(config, assumptions=Assumptions(code=code)))
        for code in (OtherCode(), OtherCode(gradient_bytes=2, moment_bytes=2))
    )
    for before, after in zip(ours, half, strict=True):
        assert after.gradients * 2 == before.gradients and after.weights == before.weights
        # Masters in float32, and two moments, of 4 bytes or of 2.
        assert max(after.optimizer) / max(before.optimizer) == pytest.approx(8 / 12, rel=1e-4)


def test_ranks_that_share_weights_keep_a_shard_of_each() -> None:
    """Dense weights are cut over 16 ranks, the experts of each of 4 over 4; the last layer's prediction of
    another token is one layer more, with a copy of the embedding."""
    sizes = [
        "parallelism.ep=4",
        "optim=adamw",
        "dep.mode=coupled",
        *trained_vision("nothing"),
    ]
    config = compose(["experiment=k25_pretrain_4k", *sizes])
    whole, cut, more = (
        pipeline_states(plan_pipeline(config, assumptions=Assumptions(code=code)))
        for code in (OtherCode(), OtherCode(sharding=Sharding.weights), OtherCode(mtp_layers=1))
    )
    layer = plan_pipeline(config).stages[1].parameters.layer(1)
    experts = sum(each.size // 4 for each in layer if each.is_expert)
    dense = sum(each.size for each in layer if not each.is_expert)
    assert whole[1].gradients == 4 * 4 * (experts + dense)
    assert cut[1].gradients == pytest.approx(4 * 4 * (experts / 4 + dense / 16), rel=1e-6)
    model = config.model
    joins = 2 * model.hidden_size**2 + 3 * model.hidden_size + model.vocab_size * model.hidden_size
    assert more[-1].gradients - whole[-1].gradients == 4 * (experts + dense + joins)
