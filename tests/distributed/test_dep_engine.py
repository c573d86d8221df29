"""The engine of the decoupled encoder over real ranks, against one process that encodes everything itself."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch.distributed as dist

from parallel.dep.plan import VisionItem, plan_vision, transfers_of
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.toy_encoder import (
    BATCHES,
    COST,
    NUM_MICRO_BATCHES,
    NUM_RANKS,
    NUM_REPLICAS,
    Part,
    Toy,
    alone,
    check_batch,
    chunks_of_rank,
    engine_setup,
    gradients_of,
    loss_of,
    start_exchange,
)

pytestmark = pytest.mark.distributed


def together(context: RankContext, device_bytes: int, is_trained: bool) -> dict[str, Part]:
    """One rank's part of every batch, encoded before and after the pipeline."""
    exchange = start_exchange(context, NUM_REPLICAS)
    return {name: upfront(exchange, items, device_bytes, is_trained) for name, items in BATCHES.items()}


def upfront(exchange: Any, items: Sequence[VisionItem], device_bytes: int, is_trained: bool) -> Part:
    from parallel.dep.engine import VisionWork
    from parallel.dep.part_exchange import PartExchange
    from parallel.dep.upfront_engine import UpfrontEngine

    toy, rank = Toy(), exchange.rank
    parts = PartExchange(dist.new_group(), phase=lambda *_: nullcontext())
    engine = UpfrontEngine(engine_setup(exchange, is_trained, device_bytes), toy, parts)
    plan = plan_vision(items, NUM_RANKS, COST, max_patches_per_chunk=30, split=False)
    own = transfers_of(plan, NUM_MICRO_BATCHES, rank, exchange.replica)
    engine.start(VisionWork(plan, chunks_of_rank(rank, plan), own))
    features = {}
    if rank < NUM_REPLICAS:
        for micro_batch in range(NUM_MICRO_BATCHES):
            leaf = engine.leaf(micro_batch)
            if leaf is not None:
                features[rank, micro_batch] = leaf.detach().clone()
                assert leaf.requires_grad == is_trained
                if is_trained:
                    loss_of(leaf, rank, micro_batch).backward()
    engine.finish()
    return features, gradients_of(toy), engine.stats


@pytest.mark.parametrize("device_bytes", [0, 600, 1 << 30], ids=lambda size: f"{size} bytes on the device")
def test_all_ranks_together_are_one_process(device_bytes: int) -> None:
    ranks = run_ranks(together, NUM_RANKS, device_bytes, True)
    for name, items in BATCHES.items():
        by_rank = [rank[name] for rank in ranks]
        check_batch(by_rank, items)
        assert max(stats.peak_feature_bytes for *_, stats in by_rank) <= device_bytes


def test_a_frozen_encoder_sends_no_gradient_and_encodes_once() -> None:
    trained, frozen = (run_ranks(together, NUM_RANKS, 1 << 30, is_trained) for is_trained in (True, False))
    for name, items in BATCHES.items():
        expected, _ = alone(items)
        found = {key: value for rank in frozen for key, value in rank[name][0].items()}
        assert found.keys() == expected.keys()
        for _, gradients, stats in (rank[name] for rank in frozen):
            assert stats.backward_s == 0
            assert not any(gradient.any() for gradient in gradients)
        sent = [sum(rank[name][2].sent_bytes for rank in ranks) for ranks in (trained, frozen)]
        assert sent[0] == 2 * sent[1]
