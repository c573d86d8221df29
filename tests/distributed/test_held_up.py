"""Clumsy surroundings and odd sizes that change nothing: runs in them are bitwise those without them."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.helpers.faults.small_jobs import JobSpec, Outcome, SmallJob
from tests.helpers.interrupted_runs import rows, without_times
from tests.helpers.parity import TOLERANCE, worst_difference
from tests.helpers.runs import layout, losses_of, overrides
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import Sample, make_image, make_text, write_shard_set

pytestmark = pytest.mark.distributed

LATER_EPOCHS = (
    "train.steps=6 data.limit_samples=3 checkpoint.interval=3 checkpoint.keep=9 train.eval_interval=6 "
    "train.eval_sequences=2 train.global_batch_size=2 model.num_layers=3 optim.warmup=1 "
    "optim.decay=1"
).split()
"""Three samples of each kind are used up within a step or two."""
SURROUNDINGS = {
    # Of an allocation that is not the run's, and of a shell that was a rank once.
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "node[1-8]",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "COLUMNS": "20",
    "TERM": "dumb",
}


def leave_only_a_rank() -> None:
    """Take away what torchrun sets but RANK, and what a shell sets."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    for name in ("HOME", "TMPDIR", "USER", "LOGNAME"):
        os.environ.pop(name, None)
    os.environ["RANK"] = "3"


def start(
    arguments: Sequence[str], run: Path, scratch: Path, plant: Callable[[], None] | None = None
) -> Outcome:
    """Run the training command alone, in surroundings that are `plant`'s."""
    spec = JobSpec(
        arguments=arguments,
        num_ranks=1,
        scratch=scratch,
        run=run,
        folders=[scratch],
        environment=SURROUNDINGS if plant else {},
        plant=plant,
    )
    with SmallJob(spec) as job:
        return job.run(lambda _: None, timeout_s=240.0)


def test_a_later_epoch_goes_on_bitwise_in_clumsy_surroundings(data: Path, tmp_path: Path) -> None:
    """Odd names, links, leftovers of other programs in the environment, and in the metrics of a crash."""
    odd = tmp_path / "a set [1] *? # é"
    odd.symlink_to(data)
    whole, resumed = tmp_path / "whole", tmp_path / "a run with blanks"
    assert start(overrides(data, whole, *layout(), *LATER_EPOCHS), whole, tmp_path / "first").statuses == (0,)
    # As it was after step 3; its checkpoints are on another disk, and a crash left zeros and half a line.
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step_6", "loss.png"))
    (resumed / "checkpoints").rename(tmp_path / "elsewhere")
    (resumed / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with (resumed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "lo' + bytes(4096))

    outcome = start(
        overrides(odd, resumed, *layout(), *LATER_EPOCHS), resumed, tmp_path / "second", leave_only_a_rank
    )

    assert outcome.statuses == (0,), outcome.output
    assert "resuming after step 3 of 6" in " ".join(outcome.output.split())
    assert without_times(rows(resumed)) == without_times(rows(whole))
    left = sorted(path.name for path in (tmp_path / "elsewhere").glob("step_*"))
    assert left == ["step_3", "step_6"]


FEW = "train.steps=3 optim.warmup=1 optim.decay=1 train.global_batch_size=4".split()
TEXT = mix(text=1)
SHAPES: dict[str, tuple[dict[str, int], list[str]]] = {
    "text alone, tower in bubbles": ({"pp": 2}, [*TEXT, "dep.schedule=bubbles"]),
    "text alone, decoupled": ({"dp": 2}, TEXT),
    "an expert per rank, all chosen": (
        {"ep": 2, "dp": 2},
        ["model.num_experts=2", "model.num_experts_per_token=2"],
    ),
    "many more experts than tokens": (
        {"ep": 2, "dp": 2},
        ["model.num_experts=256", "model.num_experts_per_token=1", "train.seq_len=100"],
    ),
    "an odd length": ({"pp": 2}, ["train.seq_len=107"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes_train_as_one_process(name: str, data: Path, tmp_path: Path) -> None:
    sizes, more = SHAPES[name]
    more = [*more, *FEW, "data.max_skipped_samples=99"]
    alone = losses_of(overrides(data, tmp_path, *layout(), *more), 1)
    ranks = sizes.get("pp", 1) * sizes.get("dp", 1)
    assert worst_difference(losses_of(overrides(data, tmp_path, *layout(**sizes), *more), ranks), alone) < (
        TOLERANCE
    )


@pytest.mark.slow
def test_a_set_of_scraps_trains(tmp_path: Path) -> None:
    """Hundreds of texts of a letter, captions without a word, one sample of a kind."""
    samples = [Sample(f"t{n}", "text", ["abcdefgh"[n % 8]]) for n in range(300)]
    samples += [Sample(f"c{n}", "caption", [make_image(20, 20, "png", n), ""]) for n in range(3)]
    samples += [Sample("c3", "caption", [make_image(28, 28, "png", 9), make_text(4, 9)])]
    data = write_shard_set(tmp_path / "scraps", {"train": samples, "heldout": samples})
    more = [*FEW, *mix(text=0.5, caption=0.5), "data.max_skipped_samples=99"]
    alone = losses_of(overrides(data, tmp_path, *layout(), *more), 1)
    assert all(0 < loss < 10 and norm < 100 for loss, norm in alone)
    assert worst_difference(losses_of(overrides(data, tmp_path, *layout(pp=2), *more), 2), alone) < TOLERANCE
