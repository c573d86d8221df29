"""What a rank's queries attend to in each block, against the documents' tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.context.blocks import ContextShard, KeyBlock
from parallel.context.plan import ContextPlan, plan_context

CPU = torch.device("cpu")


def attended(plan: ContextPlan, rank: int, block: KeyBlock) -> set[tuple[int, int]]:
    """Pairs of a query and a key that it attends to, as places in the micro-batch."""
    queries = torch.from_numpy(plan.positions(rank))[block.rows]
    tokens = torch.cat([torch.from_numpy(plan.positions(source)) for source in block.sources])
    keys = tokens[block.keys]
    first, last = block.first_and_last_keys
    pairs = [
        (query, key)
        for query, begin, end in zip(queries.tolist(), first.tolist(), last.tolist(), strict=True)
        for key in keys[begin : end + 1].tolist()
    ]
    assert len(pairs) == len({*pairs}), "a query attends to a key once"
    return {*pairs}


def expected_pairs(plan: ContextPlan) -> set[tuple[int, int]]:
    """All pairs of a token and an earlier one of its document, or itself."""
    found, begin = set(), 0
    for number, length in enumerate(plan.document_lengths):
        if number not in plan.padding:
            found |= {(begin + query, begin + key) for query in range(length) for key in range(query + 1)}
        begin += length
    return found


def orders(num_ranks: int, rank: int) -> list[tuple[tuple[int, ...], ...]]:
    """All ranks' tokens at once; those of one rank after another."""
    ring = tuple(((rank - step) % num_ranks,) for step in range(num_ranks))
    return [(tuple(range(num_ranks)),), ring]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    padding=st.frozensets(st.integers(0, 7), max_size=2),
    num_ranks=st.sampled_from([2, 3, 4]),
)
@settings(max_examples=40, deadline=None)
def test_blocks_together_have_every_pair_once(
    lengths: list[int], padding: frozenset[int], num_ranks: int
) -> None:
    lengths.append(-sum(lengths) % num_ranks or num_ranks)
    plan = plan_context(lengths, {each for each in padding if each < len(lengths)}, num_ranks)
    for way in range(2):
        found: list[tuple[int, int]] = []
        for rank in range(num_ranks):
            shard = ContextShard(plan, rank, CPU)
            order = orders(num_ranks, rank)[way]
            blocks = shard.blocks(order)
            assert blocks is shard.blocks(order), "made once for all layers"
            for block in blocks:
                assert block.is_causal == (rank in block.sources)
                found += attended(plan, rank, block)
        assert len(found) == len({*found})
        assert {*found} == expected_pairs(plan)


def test_segments_say_what_bounds_say() -> None:
    plan = plan_context((300, 20, 180, 12), (3,), 2)
    [block] = ContextShard(plan, 1, CPU).blocks(((0, 1),))
    sizes = torch.tensor(block.segments)
    assert block.bounds.diff(dim=1).T.tolist() == sizes.tolist()
    assert tuple(block.longest) == tuple(sizes.amax(0).tolist())
    assert block.num_queries == sizes[:, 0].sum() and len(block.keys) == sizes[:, 1].sum()


def test_neighbouring_queries_are_a_range() -> None:
    plan = plan_context((64, 64), (1,), 2)
    for rank in range(2):
        [block] = ContextShard(plan, rank, CPU).blocks(((0, 1),))
        assert isinstance(block.rows, slice)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_of_padding_attends_to_nothing(num_ranks: int) -> None:
    plan = plan_context((8, 8), (0, 1), num_ranks)
    [block] = ContextShard(plan, 0, CPU).blocks((tuple(range(num_ranks)),))
    assert not block.segments and not block.num_queries and not len(block.keys)
