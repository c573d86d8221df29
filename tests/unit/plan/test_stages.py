"""Each stage of the recipe at its real size: it composes, and its plan fits the nodes that its file names."""

import re
from functools import cache
from itertools import pairwise

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.context import ExchangePlan, best_of, exchange_of, reason_of, with_exchange
from k25_train.plan.memory.room import Fit, room_of
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from parallel.config import ContextExchange
from tests.helpers.project_sources import REPO

LONG = {"32k": 32, "64k": 64, "128k": 128, "262k": 256}
"""Name of a mid-training stage -> its sequences in units of 1,024 tokens."""
STAGES = (
    "k25_vit",
    "k25_projector",
    "k25_pretrain_4k",
    "k25_anneal_4k",
    *(f"k25_midtrain_{name}" for name in LONG),
    "sft_zero_vision",
)


@cache
def stage(name: str) -> Config:
    return with_exchange(compose([f"experiment={name}"]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_fits_the_nodes_that_its_file_names(name: str) -> None:
    config = stage(name)
    text = (REPO / f"conf/experiment/{name}.yaml").read_text(encoding="utf-8")
    header = text[: text.index("defaults:")]
    (nodes,) = {int(found) for found in re.findall(r"(\d+) nodes", header)}
    assert config.cluster.nodes == nodes
    assert 32 <= nodes <= 128
    assert room_of(plan_pipeline(config)).fit is Fit.fits


@pytest.mark.parametrize("name", LONG)
def test_a_long_stage_keeps_the_batch_and_stretches_what_it_needs(name: str) -> None:
    config, tokens = stage(f"k25_midtrain_{name}"), 1024 * LONG[name]
    assert config.train.seq_len == tokens
    assert config.train.seq_len * config.train.global_batch_size == 1 << 26
    rope = config.model.rope
    assert rope.original_max_position * rope.scaling_factor == tokens
    # As many tokens for each rank as in the 4K stage.
    assert tokens // config.parallelism.cp == 4096
    assert plan_step(plan_pipeline(config)).mfu > 0.1


def test_nothing_grows_with_the_square_of_a_sequence() -> None:
    """With as many tokens for each rank, on the same nodes: of all-gathered latents and their
    keys twice as much for twice as long sequences, and as much of all else."""
    taken: dict[ContextExchange, list[float]] = {exchange: [] for exchange in ContextExchange}
    for name, shared in (("32k", 8), ("64k", 16), ("128k", 32), ("262k", 64)):
        tokens = 1024 * LONG[name]
        for exchange, found in taken.items():
            sizes = [
                "cluster.nodes=128",
                "train.eval_sequences=128",
                f"parallelism.cp={shared}",
                f"parallelism.cp_exchange={exchange.value}",
                f"train.seq_len={tokens}",
                f"train.global_batch_size={(1 << 26) // tokens}",
            ]
            config = compose(["experiment=k25_midtrain_262k", *sizes])
            room = room_of(plan_pipeline(config))
            found.append(room.worst.device)
    gathered, ring = taken[ContextExchange.all_gather], taken[ContextExchange.ring]
    assert max(ring) < 1.05 * min(ring)
    grown = [after - before for before, after in pairwise(gathered)]
    assert all(more < 2.2 * less for less, more in pairwise(grown))


def test_latents_are_gathered_where_their_keys_fit_and_go_round_where_not() -> None:
    chosen = {name: exchange_of(stage(f"k25_midtrain_{name}")) for name in LONG}
    assert chosen["32k"] is ContextExchange.all_gather
    assert chosen["262k"] is ContextExchange.ring
    assert "which lacks" in reason_of(stage("k25_midtrain_262k"))
    assert exchange_of(stage("k25_pretrain_4k")) is None
    assert reason_of(stage("k25_pretrain_4k")) == ""


def test_the_faster_exchange_is_chosen_of_those_that_fit() -> None:
    def plan(exchange: ContextExchange, seconds: float, fit: Fit, left: float) -> ExchangePlan:
        return ExchangePlan(exchange=exchange, seconds=seconds, left_bytes=left, fit=fit)

    gather, ring = ContextExchange.all_gather, ContextExchange.ring
    for of_gather, of_ring, expected in (
        ((1.0, Fit.fits, 5.0), (2.0, Fit.fits, 9.0), gather),
        ((2.0, Fit.fits, 9.0), (1.0, Fit.fits, 5.0), ring),
        ((1.0, Fit.tight, 1.0), (2.0, Fit.fits, 9.0), ring),
        ((1.0, Fit.tight, 1.0), (2.0, Fit.tight, 2.0), gather),
        ((1.0, Fit.does_not_fit, -9.0), (2.0, Fit.tight, 2.0), ring),
        ((1.0, Fit.does_not_fit, -9.0), (2.0, Fit.does_not_fit, -3.0), ring),
    ):
        plans = [plan(gather, *of_gather), plan(ring, *of_ring)]
        assert best_of(plans).exchange is expected
