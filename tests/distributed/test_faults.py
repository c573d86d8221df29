"""Faults end a job soon, with their cause told, no process left and the last checkpoint whole."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from k25_train.checkpoint.folders import newest_checkpoint
from k25_train.checkpoint.integrity import verify
from k25_train.compose.resolve import compose
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.loader import DataLoader
from tests.helpers.interrupted_runs import (
    LONG,
    ONE_RANK,
    SHORT,
    long_run,
    rows,
    short_run,
    without_times,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, start_run
from tests.helpers.torchrun_jobs import Job

pytestmark = pytest.mark.distributed

START_S = 120.0
"""Most seconds that a job takes to start and train its first steps, on a machine that is busy otherwise."""
END_S = 60.0
"""Most seconds from a fault to the end of the job."""


def has_row(run: Path, step: int) -> bool:
    """Whether the metrics reach `step`."""
    return (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(run))


def test_a_job_ended_from_outside_goes_on_bitwise(data: Path, tmp_path: Path) -> None:
    """One command, started four times: SIGTERM, SIGKILL to a rank, SIGKILL to torchrun, and to the end."""
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    # Two ranks, since each takes seconds of imports in each job.
    sizes = layout(ep=2, dp=2)
    # Each rank has a process that reads for it, which ends with it and outlives a SIGTERM to the job.
    command = long_run(data, run, *sizes, "data.read_in=process")

    with Job(command, 2, tmp_path / "terminated.log") as job:
        job.wait_until(lambda: has_row(run, 2), START_S)
        job.terminate(num_ranks=2)
        job.wait(END_S)
    stopped_at = rows(run)[-1]["step"]
    assert f"SIGTERM: checkpoint of step {stopped_at} saved" in job.output
    assert verify(newest_checkpoint(run / "checkpoints")).step == stopped_at < LONG.saved_at

    with Job(command, 2, tmp_path / "killed.log") as job:
        job.wait_until(lambda: has_row(run, LONG.saved_at + 1), START_S)
        time.sleep(0.1)
        os.kill(job.rank(1), signal.SIGKILL)
        assert job.wait(END_S) != 0
    assert f"resuming after step {stopped_at} of {LONG.num_steps}" in job.output
    assert "Signal 9 (SIGKILL)" in job.output
    assert verify(newest_checkpoint(run / "checkpoints")).step == LONG.saved_at

    with Job(command, 2, tmp_path / "orphaned.log") as job:
        job.wait_until(lambda: f"step {LONG.saved_at + 2}/" in job.output, START_S)
        job.signal(signal.SIGKILL)
        job.wait_until_gone(END_S)
    stopped_at = rows(run)[-1]["step"]
    assert verify(newest_checkpoint(run / "checkpoints")).step == stopped_at < LONG.num_steps

    run_ranks(fit, 2, command)
    run_ranks(fit, 2, long_run(data, uninterrupted, *sizes))
    assert without_times(rows(run)) == without_times(rows(uninterrupted))


@dataclass(frozen=True, slots=True)
class BrokenSet:
    """A shard set with one image that does not decode."""

    folder: Path
    sample: SampleRecord
    step: int
    """The first step that reads it, from 1; of two data-parallel ranks, rank 1 does."""


@pytest.fixture(scope="module")
def broken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> BrokenSet:
    folder = shutil.copytree(data, tmp_path_factory.mktemp("broken") / "shards")
    config = compose(short_run(data, folder / "run", *ONE_RANK))
    loader = DataLoader(config.data, config.train, config.model.vision)
    step, sample = first_image_of_second_half(loader)
    (media,) = [segment for segment in sample.segments if isinstance(segment, MediaSegment)]
    with (folder / media.shard).open("r+b") as shard:
        shard.seek(media.offset)
        shard.write(bytes(media.num_bytes))
    return BrokenSet(folder, sample, step)


def first_image_of_second_half(loader: DataLoader) -> tuple[int, SampleRecord]:
    """A step, and a sample with an image in the second half of its batch that no earlier sequence holds."""
    seen: set[str] = set()
    for step in range(1, SHORT.num_steps + 1):
        sequences = loader.plan(step - 1).sequences
        for number, sequence in enumerate(sequences):
            for sample in (piece.record for piece in sequence.pieces):
                is_new = sequence.source in ("caption", "ocr") and sample.key not in seen
                if is_new and number >= len(sequences) // 2:
                    return step, sample
                seen.add(sample.key)
    raise AssertionError("no image comes first in a second half")


def test_a_rank_that_raises_ends_the_job_and_is_heard(broken: BrokenSet, tmp_path: Path) -> None:
    command = short_run(broken.folder, tmp_path / "run", *layout(dp=2))

    with Job(command, 2, tmp_path / "raised.log") as job:
        assert job.wait(START_S + END_S) != 0

    assert "rank 1: DataError: 1 samples cannot be used, data.max_skipped_samples=0 are allowed" in job.output
    assert f"{broken.folder}/{broken.sample.shard}, sample {broken.sample.key}: its image" in job.output
    assert rows(tmp_path / "run")[-1]["step"] == broken.step - 1


def train_and_count(
    context: RankContext, arguments: Sequence[str], num_steps: int
) -> tuple[list[float], list[str], str]:
    """Losses of the first steps, skipped samples, and what was logged of them."""
    from k25_train.training.step import train_step

    log = StringIO()
    logging.getLogger("k25_train").addHandler(logging.StreamHandler(log))
    run = start_run(context, arguments)
    with run.data:
        losses = [train_step(run, step).loss for step in range(1, num_steps + 1)]
    return losses, list(run.data.skip_log.skipped), log.getvalue()


def test_an_undecodable_image_within_the_limit_is_skipped_alike_in_every_layout(
    broken: BrokenSet, run_alone: Path, tmp_path: Path
) -> None:
    name = f"{broken.folder}/{broken.sample.shard}, sample {broken.sample.key}"
    losses = []
    # With a coupled tower the first stage alone decodes and counts; else one rank decodes and all count.
    counted = {(1, "decoupled"): [[name]], (2, "decoupled"): [[name], [name]], (2, "coupled"): [[name], []]}
    for (pp, mode), by_stage in counted.items():
        command = short_run(broken.folder, tmp_path / f"{pp} {mode}", *layout(pp=pp), f"dep.mode={mode}")
        by_rank = run_ranks(train_and_count, pp, [*command, "data.max_skipped_samples=1"], broken.step)
        assert [skipped for _, skipped, _ in by_rank] == by_stage
        told = [f"skipped {name}: its image" in log for _, _, log in by_rank]
        assert told == [True] + [False] * (pp - 1), "each rank counts, the first one tells"
        losses.append(by_rank[-1][0])
    intact = [row["loss"] for row in rows(run_alone)[1 : broken.step + 1]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0][:-1] == pytest.approx(intact[:-1], rel=1e-5)
    assert abs(losses[0][-1] - intact[-1]) > 1e-4, "the sample still counts"
