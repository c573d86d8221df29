"""A shard set that one rank cannot read any more: faults that pass cost nothing, others end all ranks."""

import errno
import logging
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from k25_train.checkpoint.folders import newest_checkpoint
from k25_train.checkpoint.integrity import verify
from tests.helpers.interrupted_runs import SHORT, rows, short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, start_run

pytestmark = pytest.mark.distributed

PASSES_AT, GONE_AT = 2, 4
"""Steps at which rank 0 cannot read twice, and from which on rank 1 cannot read at all."""


def break_reads(run: Any, step: int, failures: int, number: int) -> None:
    """Let as many reads from the given step on fail with this error number."""
    sources = run.data.loader.sources.values()
    reader = next(iter(sources)).reader._files.folder
    read_at, read = reader._files.read, run.data.loader.micro_batches
    left = failures

    def broken(path: str, offset: int, num_bytes: int) -> bytes:
        nonlocal left
        if left > 0:
            left -= 1
            raise OSError(number, "broken", path)
        return bytes(read_at(path, offset, num_bytes))

    def micro_batches(plan: Any, **place: Any) -> Any:
        # An evaluation's plan has number 0.
        if plan.step == step - 1:
            for source in sources:
                source.documents.clear()
            reader._files.read = broken
            reader._files.read_cached = lambda *_: None
        return read(plan, **place)

    run.data.loader.micro_batches = micro_batches


def lose_data(context: RankContext, arguments: Sequence[str]) -> tuple[str, str]:
    """Train while reads fail; the error that ended the run, and what was logged."""
    from k25_train.data.storage import attempts
    from k25_train.errors import DataError
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    attempts.RETRY_DELAYS_S = attempts.GONE_DELAYS_S = (0.01, 0.01)
    log = StringIO()
    logging.getLogger("k25_train").addHandler(logging.StreamHandler(log))
    run = start_run(context, arguments)
    if context.rank == 0:
        break_reads(run, PASSES_AT, failures=2, number=errno.EIO)
    else:
        break_reads(run, GONE_AT, failures=10**6, number=errno.ENOENT)
    with (
        Report(run.config, is_main=run.is_main, device_name="CPU") as report,
        run.data,
        pytest.raises(DataError) as caught,
    ):
        Trainer(run, report).fit()
    return str(caught.value), log.getvalue()


def test_a_rank_without_data_ends_all_ranks_after_a_save(data: Path, run_alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = short_run(data, folder, *layout(dp=2))

    (error_0, log_0), (error_1, log_1) = run_ranks(lose_data, 2, command)

    # 1. What passed was told, with file and error, and cost nothing.
    assert "Input/output error, EIO; trying again in 0.01 s (1 of 2)" in log_0.replace("I/O", "Input/output")
    assert f"{data}/train-0000" in log_0
    # 2. What did not pass ended both ranks, with the step before it saved.
    assert "no such file after 3 attempts" in error_1
    assert "trying again" in log_1
    assert error_0.startswith("rank 1 could not read its share of the data")
    for error in (error_0, error_1):
        assert f"Step {GONE_AT - 1} is saved in {folder}/checkpoints" in error
    assert verify(newest_checkpoint(folder / "checkpoints")).step == GONE_AT - 1

    # 3. With the data back, the run goes on as if nothing had been.
    run_ranks(fit, 2, command)
    assert [row["step"] for row in rows(folder)] == list(range(SHORT.num_steps + 1))
    for row, expected in zip(rows(folder)[1:], rows(run_alone)[1:], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
