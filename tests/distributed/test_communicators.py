"""Communicators over real ranks: all are set up before the first step; one that does not come is named."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.parity import EVERYTHING_OVERLAPS
from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.used_groups import recorded_groups

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=3", "optim.warmup=1", "optim.decay=1", "checkpoint.interval=2")
KINDS = {
    "allgather": "all_gather_single",
    "all_gather_single_coalesced": "all_gather_single",
    "reduce_scatter_single_coalesced": "reduce_scatter_single",
    "barrier": "allreduce",
}
"""Method of a group -> the one that connects the same ranks for it."""
MET_LATER = {
    ("default_pg", "gather"),
    ("VISION_GROUP", "all_to_all_single"),
    ("VISION_FEATURES_GROUP", "send"),
    ("VISION_FEATURES_GROUP", "recv"),
    ("VISION_FEATURE_GRADIENTS_GROUP", "send"),
    ("VISION_FEATURE_GRADIENTS_GROUP", "recv"),
}
"""What connects few of many ranks, or one with the others while all wait: what torch plans of a checkpoint,
the encoder's matrices, and `connect`."""


class Found(NamedTuple):
    """Of one rank."""

    lines: list[str]
    before: set[tuple[str, str]]
    """(group, kind of operation) up to the first evaluation."""
    after: set[tuple[str, str]]
    """The same from then on."""


def trained(context: RankContext, arguments: Sequence[str]) -> Found:
    """Train, evaluate and save, recording groups."""
    from k25_train.metrics.report import Report
    from k25_train.training import run as building
    from k25_train.training.trainer import Trainer

    lines: list[str] = []
    building.say = lines.append
    with recorded_groups() as used:
        run = start_run(context, arguments)
        before = {(group, KINDS.get(kind, kind)) for group, kind in used}
        used.clear()
        report = Report(run.config, is_main=run.is_main, device_name="CPU")
        with report, run.data, run.claim:
            Trainer(run, report).fit()
    return Found(lines, before, {(group, KINDS.get(kind, kind)) for group, kind in used})


@pytest.mark.parametrize(
    "changes",
    [
        (*layout(pp=2, vpp=2, ep=2, dp=2), "dep.schedule=bubbles", *EVERYTHING_OVERLAPS),
        pytest.param((*layout(ep=2, dp=4), "optim=adamw"), marks=pytest.mark.slow),
        pytest.param(
            (*layout(pp=2, vpp=2, ep=2, cp=2), *EVERYTHING_OVERLAPS, "parallelism.cp_exchange=ring"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*layout(dp=2, cp=2), "dep.mode=coupled", "parallelism.cp_exchange=all_gather"),
            marks=pytest.mark.slow,
        ),
        pytest.param((*layout(pp=4), "dep.mode=coupled"), marks=pytest.mark.slow),
    ],
    ids=["everything overlaps", "one stage", "shared in a ring", "shared", "plain pipeline"],
)
def test_nothing_is_first_met_in_a_step(changes: Sequence[str], data: Path, tmp_path: Path) -> None:
    by_rank = run_ranks(trained, 4, overrides(data, tmp_path, *changes, *SHORT))
    # 1. Rank 0 says how long each took, in columns.
    lines = by_rank[0].lines
    assert lines
    assert all(re.fullmatch(r"communicator of [\w' ]+ +4 ranks +\d+\.\d\d s", _plain(line)) for line in lines)
    assert len({len(line) for line in lines}) == 1
    assert all(not found.lines for found in by_rank[1:])
    # 2. Training, evaluation and checkpoints use nothing else.
    for found in by_rank:
        assert found.after - found.before <= MET_LATER
        assert found.after & {("INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP", "allreduce")} == set()


def _plain(line: str) -> str:
    return re.sub(r" [12] ranks", " 4 ranks", line)


def set_up_without(context: RankContext, absent: int, arguments: Sequence[str]) -> None:
    """Build a run in which one rank never connects."""
    import time

    from k25_train.training import run as building

    building.SET_UP_S = 1.0
    if context.rank == absent:
        building.connect = lambda *_: time.sleep(60)
    start_run(context, arguments)


def test_a_rank_that_does_not_come_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died without a traceback"):
        run_ranks(set_up_without, 4, 2, overrides(data, tmp_path, *layout(ep=2, dp=4)))
    found = json.loads((tmp_path / "logs" / "stall.json").read_text())
    assert found["silent"] == [2]
    assert found["culprits"] == []
    assert (tmp_path / "logs" / "rank_0.stall.txt").read_text().count("set up communicator of all ranks")
