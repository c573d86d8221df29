"""What-ifs change what they are about alone, and say what limits."""

from dataclasses import replace
from functools import lru_cache

import pytest

from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose
from k25_train.plan.memory.verdict import Fit, judge_memory
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.variants import WhatIfKind, variants_of
from k25_train.plan.what_if import Row, WhatIf, fit_in_words, planned, what_if


@lru_cache(maxsize=4)
def large(*overrides: str) -> PipelinePlan:
    """32 nodes of H800."""
    return plan_pipeline(compose(["experiment=k25_pretrain_4k", *overrides]))


@lru_cache(maxsize=1)
def small() -> PipelinePlan:
    """Two nodes of H100, with few micro-batches."""
    return plan_pipeline(compose(["experiment=moonlight_16b", "train.global_batch_size=64"]))


@lru_cache(maxsize=8)
def table(kind: WhatIfKind) -> WhatIf:
    return what_if(kind, small(), offer(), seeks_remedy=False)


def step_s(row: Row) -> float:
    assert row.step is not None, row.verdict
    return row.step.step_s


@pytest.mark.parametrize("kind", [WhatIfKind.slow_node, WhatIfKind.network, WhatIfKind.imbalance])
def test_what_goes_wrong_takes_longer(kind: WhatIfKind) -> None:
    """The first row is what is configured; each one is worse than the one before."""
    rows = table(kind).rows
    assert step_s(rows[0]) == pytest.approx(plan_step(small()).step_s)
    times = [step_s(row) for row in rows]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_a_row_has_a_text_for_each_column() -> None:
    found = table(WhatIfKind.network)
    assert all(len(row.cells) == len(found.columns) for row in found.rows)


@pytest.mark.slow
def test_mechanisms_say_what_is_missing_without_them() -> None:
    rows = {row.name: row for row in what_if(WhatIfKind.mechanisms, large(), offer()).rows}
    assert rows["as configured"].is_possible
    for name in ("without FP8 storage", "without recomputation", "without optimizer state in the host"):
        memory = rows[name].memory
        assert memory is not None
        assert memory.fit is Fit.does_not_fit, name
        assert "GB missing on" in rows[name].verdict


@pytest.mark.slow
def test_longer_sequences_are_shared_where_nothing_else_fits() -> None:
    pipeline = large("activation=keep", "optim.offload=none", "cluster.nodes=64")
    rows = what_if(WhatIfKind.length, pipeline, offer(), seeks_remedy=False).rows
    shared = [row for row in rows if row.variant.config.parallelism.cp > 1]
    tokens = {row.variant.config.train.seq_len * row.variant.config.train.global_batch_size for row in rows}
    assert len(tokens) == 1
    assert shared
    assert all(f"parallelism.cp={row.variant.config.parallelism.cp}" in row.verdict for row in shared)


def test_what_training_refuses_has_its_words() -> None:
    variant = table(WhatIfKind.network).rows[0].variant
    sizes = variant.config.train
    before, sizes.global_batch_size = sizes.global_batch_size, 17
    try:
        row = planned(variant, offer())
    finally:
        sizes.global_batch_size = before
    assert row.step is None
    assert row.verdict.startswith("train.global_batch_size must be a multiple of")


def test_the_fuller_of_device_and_node_is_told() -> None:
    memory = judge_memory(plan_pipeline(compose(["experiment=k25_pretrain_4k"])), seeks_remedy=False)
    assert memory.margin_bytes is not None and memory.margin_bytes > 5e9
    assert fit_in_words(memory) == f"fits: {memory.margin_bytes / 1e9:.1f} GB left of stage 0"
    for left, expected in ((5e9, "5.0 GB left of a node"), (-5e9, "5.0 GB missing on a node")):
        fuller = replace(memory, node_bytes=memory.node_limit_bytes - left)
        assert fit_in_words(fuller) == f"fits: {expected}"


def test_what_is_not_asked_stays_as_configured() -> None:
    """Longer sequences are fewer; a slower network leaves all else."""
    base, every = large().config, offer()
    tokens = base.train.global_batch_size * base.train.seq_len
    for variant in variants_of(WhatIfKind.length, large(), every):
        train = variant.config.train
        assert train.global_batch_size * train.seq_len == tokens
        assert variant.value == train.seq_len
    for variant in variants_of(WhatIfKind.network, large(), every):
        assert variant.config.cluster.network_gb_per_s == variant.value
        cluster = replace(variant.config.cluster, network_gb_per_s=base.cluster.network_gb_per_s)
        assert replace(variant.config, cluster=cluster) == base


def test_lengths_start_at_the_configured_one_however_short() -> None:
    """As many doublings as for a long one, while a step's tokens can be cut into such sequences."""
    smoke = plan_pipeline(compose(["experiment=smoke"]))
    names = [variant.name for variant in variants_of(WhatIfKind.length, smoke, offer())]
    assert names == ["256 tokens", "512 tokens", "1K tokens", "2K tokens"]
    values = [variant.value for variant in variants_of(WhatIfKind.length, large(), offer())]
    assert values == [4096 << doublings for doublings in range(7)]
