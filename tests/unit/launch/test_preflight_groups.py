"""Rounds of disjoint pairs in which all that talk in training meet once."""

from collections import Counter
from itertools import combinations

import pytest

from launch.preflight.groups import Exchange, context_groups, expert_groups, pipeline_groups, plan_rounds


@pytest.mark.parametrize(
    ("world_size", "pp", "ep", "cp"),
    [(8, 2, 4, 1), (12, 2, 3, 6), (32, 2, 16, 8), (256, 16, 16, 2), (4, 4, 1, 1), (6, 3, 2, 1), (5, 1, 1, 5)],
)
def test_all_pairs_meet_once_and_nobody_twice_at_a_time(world_size: int, pp: int, ep: int, cp: int) -> None:
    rounds = plan_rounds(world_size, pp=pp, ep=ep, cp=cp)
    for one_round in rounds:
        ranks = [rank for pair in one_round.pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    met = Counter((one_round.exchange, pair) for one_round in rounds for pair in one_round.pairs)
    assert set(met.values()) <= {1}
    wanted = {
        (Exchange.experts, pair) for group in expert_groups(world_size, ep) for pair in combinations(group, 2)
    }
    rings = {
        Exchange.pipeline: pipeline_groups(world_size, pp),
        Exchange.contexts: context_groups(world_size, cp),
    }
    for exchange, groups in rings.items():
        for group in groups:
            neighbours = zip(group, group[1:] + group[:1], strict=True)
            wanted |= {(exchange, (min(pair), max(pair))) for pair in neighbours if len(group) > 1}
    assert set(met) == wanted


def test_the_reports_job_takes_few_rounds() -> None:
    """256 ranks: 15 rounds within groups of 16, and 2 over rings of 16 stages."""
    assert len(plan_rounds(256, pp=16, ep=16, cp=1)) == 17


def test_partners_are_mutual() -> None:
    for one_round in plan_rounds(12, pp=4, ep=3, cp=1):
        for rank in range(12):
            partner = one_round.partner(rank)
            assert partner is None or one_round.partner(partner) == rank


def test_one_rank_has_nobody_to_meet() -> None:
    assert plan_rounds(1, pp=1, ep=1, cp=1) == []
