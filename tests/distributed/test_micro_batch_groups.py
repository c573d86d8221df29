"""Micro-batches that the number of pipeline ranks does not divide, and chunks without layers, train and
evaluate like one process."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
SHORT = ("train.steps=3", "optim.warmup=1", "optim.decay=1", "model.num_layers=6")
OVERLAP = ("parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true")
CASES: dict[str, tuple[dict[str, int], int, int, tuple[str, ...]]] = {
    "pp2 x vpp2, 3 micro-batches": ({"pp": 2, "vpp": 2}, 3, 8, ()),
    "pp2 x vpp3, 5 micro-batches": ({"pp": 2, "vpp": 3}, 5, 2, ()),
    "pp4 x vpp2, 5 micro-batches, 6 to evaluate": ({"pp": 4, "vpp": 2}, 5, 6, ()),
    "pp4 x vpp2, 11 micro-batches": ({"pp": 4, "vpp": 2}, 11, 4, ()),
    "embedding and loss alone": ({"pp": 2, "vpp": 2}, 3, 8, ("parallelism.layout='E|ttt|ttt|L'",)),
    "overlap, embedding and loss alone": (
        {"pp": 2, "vpp": 2, "ep": 2, "dp": 2},
        3,
        12,
        (*OVERLAP, "parallelism.layout='E|ttt|ttt|L'"),
    ),
    "overlap, as many micro-batches as ranks": ({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, 2, 8, OVERLAP),
}
"""Name -> (sizes, micro-batches of a step, sequences of an evaluation, more overrides)."""
SLOW = (
    "pp2 x vpp3, 5 micro-batches",
    "pp4 x vpp2, 11 micro-batches",
    "overlap, as many micro-batches as ranks",
)
"""Variations of the others, for `make test-slow`."""


def train_and_evaluate(context: RankContext, arguments: Sequence[str]) -> list[float]:
    """Losses and gradient norms of three steps with an evaluation after the first."""
    from k25_train.training.evaluation import eval_sums
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    figures = []
    with run.data:
        for step in (1, 2, 3):
            result = train_step(run, step)
            figures += [result.loss, result.grad_norm]
            if step == 1:
                figures.append(run.objective.loss(eval_sums(run, run.config.train.eval_sequences)))
    return figures


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_trains_and_evaluates_like_one_process(name: str, data: Path, tmp_path: Path) -> None:
    sizes, num_micro_batches, eval_sequences, more = CASES[name]
    num_ranks = sizes["pp"] * sizes.get("dp", 1)
    batches = (
        f"train.global_batch_size={num_micro_batches * sizes.get('dp', 1)}",
        f"train.eval_sequences={eval_sequences}",
    )
    serial = run_ranks(train_and_evaluate, 1, overrides(data, tmp_path, *layout(), *SHORT, *batches))[0]
    arguments = overrides(data, tmp_path, *layout(**sizes), *SHORT, *batches, *more)
    for found in run_ranks(train_and_evaluate, num_ranks, arguments):
        assert found == pytest.approx(serial, rel=TOLERANCE)
