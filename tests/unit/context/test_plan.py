"""Shares of micro-batches: every token once, as many for each rank, and work as even as documents allow."""

import itertools
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.context.piece import Piece
from parallel.context.plan import ContextPlan, plan_context
from parallel.context.shares import share_documents


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[tuple[int, ...], frozenset[int], int]:
    """Lengths of documents, which of them are padding, and ranks that can share them."""
    num_ranks = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
    lengths.append(-sum(lengths) % num_ranks or num_ranks)
    padding = draw(st.frozensets(st.integers(0, len(lengths) - 1), max_size=4))
    return tuple(lengths), padding, num_ranks


@given(micro_batches())
@example(((1,) * 8, frozenset(), 8))
@example(((3, 5), frozenset({0, 1}), 4))
@example(((64,), frozenset(), 4))
@settings(max_examples=50, deadline=None)
def test_every_token_is_on_one_rank_and_all_have_as_many(
    case: tuple[tuple[int, ...], frozenset[int], int],
) -> None:
    lengths, padding, num_ranks = case
    plan = plan_context(lengths, padding, num_ranks)
    assert plan == ContextPlan(lengths, padding, share_documents(lengths, padding, num_ranks))
    positions = [plan.positions(rank).tolist() for rank in range(num_ranks)]
    assert sorted(itertools.chain.from_iterable(positions)) == [*range(sum(lengths))]
    assert {len(each) for each in positions} == {plan.num_tokens}
    for pieces, places in zip(plan.pieces, positions, strict=True):
        assert list(pieces) == sorted(pieces) and places == sorted(places)
        for piece, following in itertools.pairwise(pieces):
            assert piece.num_tokens and following.num_tokens
            joined = piece.document == following.document and piece.stop == following.start
            assert not joined, "neighbours are one piece"


@given(micro_batches())
@settings(max_examples=50, deadline=None)
def test_a_rank_has_few_pieces_of_a_document(
    case: tuple[tuple[int, ...], frozenset[int], int],
) -> None:
    lengths, padding, num_ranks = case
    for pieces in plan_context(lengths, padding, num_ranks).pieces:
        of_document = [piece.document for piece in pieces]
        assert max(of_document.count(each) for each in of_document) <= 2


@given(micro_batches())
@settings(max_examples=50, deadline=None)
def test_no_more_work_than_in_plain_zig_zag(case: tuple[tuple[int, ...], frozenset[int], int]) -> None:
    lengths, padding, num_ranks = case
    assert most_work(plan_context(lengths, padding, num_ranks).pieces, padding) <= most_work(
        plain_zig_zag(lengths, num_ranks), padding
    )


def plain_zig_zag(lengths: tuple[int, ...], num_ranks: int) -> list[list[Piece]]:
    """The micro-batch in 2 pieces for each rank, wherever documents are, token by token."""
    owners: dict[tuple[int, int], list[int]] = {}
    share, position = sum(lengths) // num_ranks, 0
    half = share // 2
    for document, length in enumerate(lengths):
        for token in range(length):
            if position < half * num_ranks:
                rank = position // half
            else:
                rank = num_ranks - 1 - (position - half * num_ranks) // (share - half)
            owners.setdefault((rank, document), []).append(token)
            position += 1
    pieces: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for (rank, document), tokens in owners.items():
        start = before = tokens[0]
        for token in [*tokens[1:], -1]:
            if token != before + 1:
                pieces[rank].append(Piece(document, start, before + 1))
                start = token
            before = token
    return pieces


def most_work(pieces: object, padding: frozenset[int]) -> int:
    return max(sum(each.work for each in of_rank if each.document not in padding) for of_rank in pieces)  # type: ignore[attr-defined]


def test_one_document_is_cut_in_zig_zag() -> None:
    plan = plan_context((64 * 8,), (), 4)
    assert plan.pieces[0] == (Piece(0, 0, 64), Piece(0, 448, 512))
    assert plan.pieces[3] == (Piece(0, 192, 320),)
    assert len({plan.num_pairs(rank) for rank in range(4)}) == 1


def test_documents_that_even_out_stay_whole() -> None:
    plan = plan_context((500, 500, 300, 300, 200, 200), (), 2)
    assert all(len(plan.pieces[rank]) == 3 for rank in range(2))
    assert plan.num_pairs(0) == plan.num_pairs(1)


def test_padding_fills_up() -> None:
    plan = plan_context((100, 28, 100, 28), (1, 3), 2)
    assert [plan.num_pairs(rank) for rank in range(2)] == [5050, 5050]


def lengths_of(name: str, tokens: int) -> list[int]:
    """Documents as packing has them."""
    draws = random.Random(name)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = {
            "web": lambda: draws.lognormvariate(6, 1.5),
            "long": lambda: draws.lognormvariate(9, 1.5),
            "heavy tail": lambda: 200 * draws.paretovariate(0.9),
            "a book and notes": lambda: draws.lognormvariate(6, 1) if lengths else tokens / 2,
        }[name]()
        lengths.append(min(max(round(length), 1), tokens - sum(lengths)))
    return lengths


@pytest.mark.parametrize("name", ["web", "long", "heavy tail", "a book and notes"])
@pytest.mark.parametrize("num_ranks", [4, 8, 16])
def test_work_of_realistic_documents_is_even(name: str, num_ranks: int) -> None:
    lengths = lengths_of(name, 262_144)
    plan = plan_context(lengths, (), num_ranks)
    work = [sum(piece.work for piece in pieces) for pieces in plan.pieces]
    assert max(work) < 1.12 * sum(work) / num_ranks
    # Zig-zag through the micro-batch, which cuts where it happens to.
    plain = most_work(plain_zig_zag(tuple(lengths), num_ranks), frozenset())
    assert max(work) < 0.85 * plain


def test_a_plan_of_thousands_of_documents_takes_little_time() -> None:
    lengths = [100] * 2621 + [44]
    begin = time.process_time()
    plan_context(lengths, (), 16)
    # Some 20 ms. A quadratic search would take minutes.
    assert time.process_time() - begin < 5


def test_ranks_that_cannot_have_as_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens cannot be shared evenly by 4 ranks"):
        plan_context((10,), (), 4)
