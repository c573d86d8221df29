"""Who holds a vision token: found in the index alone, it is what ranks find that have read the words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from k25_train.data import placeholders
from k25_train.data.batch import MicroBatch
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import StepPlan
from k25_train.data.placeholders import runs_in
from parallel.context.plan import ContextPlan, plan_context
from parallel.dep.transfers import RowRun, of_whole_replica
from tests.helpers.held_rows import held_by
from tests.helpers.smoke_mix import shard_sources
from tests.helpers.tiny_shards import (
    all_words,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

DP = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("tiny"))


def loader_of(folder: Path, micro_batch_size: int, **weights: float) -> DataLoader:
    """Of the sources with these weights, or of all."""
    train = replace(tiny_train_config(), micro_batch_size=micro_batch_size)
    data = tiny_data_config(folder)
    sources = shard_sources(**weights) if weights else data.sources
    return DataLoader(replace(data, sources=sources), train, tiny_vision_config())


def plans_of(loader: DataLoader) -> Mapping[str, StepPlan]:
    return {
        **{f"step {step}": loader.plan(step) for step in range(6)},
        "an evaluation": loader.plan_evaluation(8),
        "one with others' images": loader.plan_evaluation(8, shuffle_media_seed=5),
    }


@pytest.mark.parametrize("weights", [{}, {"video": 1.0}], ids=str)
@pytest.mark.parametrize(("cp", "micro_batch_size"), [(2, 1), (4, 2)])
def test_others_know_who_holds_which_vision_tokens(
    tiny: Path,
    cp: int,
    micro_batch_size: int,
    weights: Mapping[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Documents of the tiny set are cut, too.
    monkeypatch.setattr("parallel.context.shares.MIN_PIECE_TOKENS", 8)
    num_shared = 0
    for name, plan in plans_of(loader := loader_of(tiny, micro_batch_size, **weights)).items():
        num_micro_batches = plan.num_sequences // micro_batch_size // DP
        orders = [list(range(num_micro_batches))[::-1], range(num_micro_batches)]
        runs = runs_in(plan, orders, loader.sources, micro_batch_size=micro_batch_size, seq_len=128, cp=cp)
        for replica in range(DP):
            batches = loader.micro_batches(
                plan, dp_rank=replica, dp_size=DP, reads=all_words(with_pixels=False)
            )
            for turn, number in enumerate(orders[replica]):
                found = runs(replica, turn)
                assert held(found, replica, cp) == expected_of(batches[number], cp), name
                assert len(found) == len(joined(found)), "neighbours of one rank are one run"
                num_shared += len({run.rank for run in found}) > 1
    assert num_shared > 4, "hardly any micro-batch has vision tokens on several ranks"


def held(runs: Sequence[RowRun], replica: int, cp: int) -> list[list[int]]:
    """[rank that shares the micro-batch] -> rows of its features that it holds."""
    return [held_by(runs, replica * cp + rank, 10**6).tolist() for rank in range(cp)]


def joined(runs: Sequence[RowRun]) -> list[int]:
    ranks = [run.rank for run in runs]
    return [rank for number, rank in enumerate(ranks) if not number or ranks[number - 1] != rank]


def expected_of(batch: MicroBatch, cp: int) -> list[list[int]]:
    """The same from a micro-batch that was read."""
    plan = plan_context(batch.document_lengths, set(batch.padding) - set(batch.unreadable), cp)
    positions = batch.media_positions.numpy()
    return [np.flatnonzero(np.isin(positions, plan.positions(rank))).tolist() for rank in range(cp)]


def test_one_rank_has_all_of_them_and_nothing_is_looked_up(tiny: Path) -> None:
    loader = loader_of(tiny, 2)
    runs = runs_in(loader.plan(0), [], loader.sources, micro_batch_size=2, seq_len=128, cp=1)
    assert runs is of_whole_replica


def test_documents_are_shared_as_those_of_the_micro_batches(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def recorded(lengths: Sequence[int], padding: Sequence[int], num_ranks: int) -> ContextPlan:
        shared.append((tuple(lengths), tuple(padding)))
        return plan_context(lengths, padding, num_ranks)

    monkeypatch.setattr(placeholders, "plan_context", recorded)
    loader = loader_of(tiny, 2)
    plan = loader.plan(1)
    runs = runs_in(plan, [range(4)], loader.sources, micro_batch_size=2, seq_len=128, cp=2)
    batches = loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=False))
    for number in range(4):
        runs(0, number)
    assert shared == [(batch.document_lengths, batch.padding) for batch in batches]
    assert any(padding for _, padding in shared)
