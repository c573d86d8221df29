"""The engine of the decoupled encoder over real ranks, against one process that encodes everything itself."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch.distributed as dist

from parallel.dep.plan import VisionItem, plan_vision
from parallel.dep.transfers import Receiver, transfers_of
from tests.helpers.held_rows import made_up_runs
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
    exchange_in,
    gradients_of,
    loss_of,
    put_together,
    start_exchange,
    take,
)

pytestmark = pytest.mark.distributed


def together(context: RankContext, device_bytes: int, is_trained: bool) -> dict[tuple[int, str], Part]:
    """One rank's part of every batch, encoded before and after the pipeline, where replicas have one rank in
    the first stage, or two."""
    exchange = start_exchange(context, NUM_REPLICAS)
    shared = exchange_in(dist.new_group(), dist.new_group(), 2 * NUM_REPLICAS)
    return {
        (cp, name): upfront(each, items, cp, device_bytes, is_trained)
        for cp, each in ((1, exchange), (2, shared))
        for name, items in BATCHES.items()
    }


def upfront(exchange: Any, items: Sequence[VisionItem], cp: int, device_bytes: int, is_trained: bool) -> Part:
    from parallel.dep.engine import VisionWork
    from parallel.dep.part_exchange import PartExchange
    from parallel.dep.upfront_engine import UpfrontEngine

    toy, rank = Toy(), exchange.rank
    parts = PartExchange(dist.new_group(), phase=lambda *_: nullcontext())
    engine = UpfrontEngine(engine_setup(exchange, is_trained, device_bytes), toy, parts)
    plan = plan_vision(items, NUM_RANKS, COST, max_patches_per_chunk=30, split=False)
    runs, replica = made_up_runs(items, cp), rank // cp if exchange.is_first_stage else None
    own = transfers_of(plan, Receiver(rank, replica, NUM_MICRO_BATCHES, runs))
    engine.start(VisionWork(plan, chunks_of_rank(rank, plan), own))
    features = {}
    for micro_batch in range(NUM_MICRO_BATCHES if replica is not None else 0):
        found = take(engine, place := (replica, micro_batch), runs, rank)
        if found is not None:
            leaf, features[place] = found
            assert leaf.requires_grad == is_trained
            if is_trained:
                loss_of(leaf, *place, features[place].rows).backward()
    engine.finish()
    return features, gradients_of(toy), engine.stats


@pytest.mark.parametrize("device_bytes", [0, 600, 1 << 30], ids=lambda size: f"{size} bytes on the device")
def test_all_ranks_together_are_one_process(device_bytes: int) -> None:
    ranks = run_ranks(together, NUM_RANKS, device_bytes, True)
    for cp, name in ranks[0]:
        by_rank = [rank[cp, name] for rank in ranks]
        check_batch(by_rank, BATCHES[name])
        assert max(stats.peak_feature_bytes for *_, stats in by_rank) <= device_bytes


def test_a_frozen_encoder_sends_no_gradient_and_encodes_once() -> None:
    trained, frozen = (run_ranks(together, NUM_RANKS, 1 << 30, is_trained) for is_trained in (True, False))
    for key in frozen[0]:
        expected, _ = alone(BATCHES[key[1]])
        assert put_together([rank[key][0] for rank in frozen]).keys() == expected.keys()
        for _, gradients, stats in (rank[key] for rank in frozen):
            assert stats.backward_s == 0
            assert not any(gradient.any() for gradient in gradients)
        sent = [sum(rank[key][2].sent_bytes for rank in ranks) for ranks in (trained, frozen)]
        assert sent[0] == 2 * sent[1]
