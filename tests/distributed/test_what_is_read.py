"""Each rank reads what it uses: middle stages no words at all, and every file is opened once."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, losses_of, overrides, start_run

pytestmark = pytest.mark.distributed

PP4 = layout(pp=4)
FEW_STEPS = ("train.steps=3", "optim.warmup=1", "optim.decay=1", "data.prefetch_steps=0")
ALONE = ("parallelism=serial", "cluster.gpus_per_node=1", "dep.mode=coupled")


class Counted(NamedTuple):
    """What one rank did in the steps of a run."""

    words_read: int
    """Samples of which it read the words."""
    media_read: int
    opened: int
    """Shards that it opened."""
    num_shards: int
    plan: tuple[float, ...]
    """Loss of each step."""


def count_reads(context: RankContext, arguments: Sequence[str]) -> Counted:
    from k25_train.data import open_files
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    reader = next(iter(run.data.loader.sources.values())).reader._files
    spans, read, really_open = {"words": 0, "all": 0, "opened": 0}, reader.read, os.open
    read_words = reader.read_words

    def counted(shard: str, offset: int, num_bytes: int) -> bytes:
        spans["all"] += 1
        return read(shard, offset, num_bytes)

    def counted_words(record: object) -> object:
        spans["words"] += 1
        return read_words(record)

    def counted_open(path: str, *flags: int, **options: int) -> int:
        spans["opened"] += str(path).endswith(".tar")
        return really_open(path, *flags, **options)

    reader.read, reader.read_words, open_files.os.open = counted, counted_words, counted_open
    with run.data:
        losses = tuple(train_step(run, step).loss for step in (1, 2, 3))
    os.open = really_open
    num_shards = len(list(Path(run.config.data.dir).glob("train-*.tar")))
    return Counted(spans["words"], spans["all"] - spans["words"], spans["opened"], num_shards, losses)


@pytest.mark.parametrize("tower", ["dep.mode=coupled", "dep.schedule=bubbles"])
def test_middle_stages_read_no_words_and_files_are_opened_once(
    tower: str, data: Path, tmp_path: Path
) -> None:
    by_rank = run_ranks(count_reads, 4, overrides(data, tmp_path, *PP4, *FEW_STEPS, tower), timeout_s=240.0)
    words = [rank.words_read for rank in by_rank]
    assert words[0] == words[3] > 0
    assert words[1:3] == [0, 0]
    if tower == "dep.mode=coupled":
        assert [rank.media_read > 0 for rank in by_rank] == [True, False, False, False]
    else:
        assert sum(rank.media_read for rank in by_rank) > 0
    for rank in by_rank:
        assert rank.opened <= rank.num_shards
        assert rank.plan == by_rank[0].plan


def break_words(folder: Path) -> int:
    """Damage the words of two captions and a text of a set; how many samples that is."""
    left = {"text": 1, "caption": 2}
    for shard in sorted(folder.glob("train-*.tar")):
        content = bytearray(shard.read_bytes())
        for line in shard.with_name(shard.stem + ".index.jsonl").read_text().splitlines()[1:]:
            record = json.loads(line)
            if left.get(record["kind"], 0):
                left[record["kind"]] -= 1
                content[record["offset"] : record["offset"] + record["bytes"]] = b"[" * record["bytes"]
        shard.write_bytes(content)
    assert not sum(left.values())
    return 3


def test_stages_that_read_nothing_learn_of_words_that_fail(data: Path, tmp_path: Path) -> None:
    """Such a sample is padding: for the balance of experts too, of which every stage has some."""
    folder = Path(shutil.copytree(data, tmp_path / "set"))
    limit = f"data.max_skipped_samples={break_words(folder)}"
    steps = ("train.steps=6", "optim.warmup=1", "optim.decay=1", limit)
    one = losses_of(overrides(folder, tmp_path / "one", *steps, *ALONE), 1)
    four = losses_of(overrides(folder, tmp_path / "four", *steps, *PP4), 4)
    sound = losses_of(overrides(data, tmp_path / "sound", *steps, *ALONE), 1)
    for step, (ours, alone) in enumerate(zip(four, one, strict=True)):
        assert ours == pytest.approx(alone, rel=1e-5), step
    assert any(abs(a[0] - b[0]) > 1e-3 for a, b in zip(one, sound, strict=True)), "nothing was broken"


def test_a_process_of_its_own_changes_no_figure(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(pp=2), *FEW_STEPS)
    expected = losses_of(arguments, 2)
    for workers in (0, 2):
        assert losses_of([*arguments, "data.read_in=process", f"data.workers={workers}"], 2) == expected


def count_differently(context: RankContext, arguments: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """How the first step ends where an item does not decode, and rank 0 has counted a sample before."""
    from dataclasses import replace

    from k25_train.data.share_reader import Failure
    from k25_train.errors import DataError
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    really_read, rank = run.data.step, run.topology.rank

    def read(step: int) -> object:
        inputs = really_read(step)
        if not rank:
            run.data.skip_log.add_named("sample 1", "its words are torn", log=False)
            return inputs
        failed = Failure(run.topology.dp_rank, 0, None, None, "sample 2", "its image is torn")
        return replace(inputs, failures=(failed,))

    run.data.step = read
    with run.data:
        try:
            train_step(run, 1)
        except DataError as error:
            return str(error), error.of_ranks
    return "", ()


def test_ranks_that_have_counted_differently_end_together(data: Path, tmp_path: Path) -> None:
    """One that passed the limit alone would leave the others in a collective, and could not save."""
    limit = "data.max_skipped_samples=1"
    command = overrides(data, tmp_path, *layout(dp=2), *FEW_STEPS, limit)
    (first, _), (other, of_ranks) = run_ranks(count_differently, 2, command, timeout_s=120.0)
    assert "2 samples cannot be used" in first
    assert ("rank 0 could not read" in other, of_ranks) == (True, (0,))
