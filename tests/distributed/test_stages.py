"""Chains over real processes: needles are found alike in every layout, and a killed chain goes on."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from k25_train.recipes.chain import load_chain
from k25_train.recipes.composed import compose_chain
from k25_train.recipes.running import check_order, is_finished
from tests.bench.stages import kill_at
from tests.helpers.interrupted_runs import rows, without_times
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import SHRUNK, layout, overrides, start_run

pytestmark = pytest.mark.distributed

WORDS = list(range(64, 128))


def needles(context: RankContext, arguments: Sequence[str]) -> list[list[float]]:
    """What random weights find in the held-out sequences."""
    from k25_train.training.needles import needle_sums

    run = start_run(context, arguments)
    with run.data:
        return needle_sums(run, 8, WORDS).tolist()


def test_needles_are_found_alike_in_every_layout(data: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(needles, 1, overrides(data, tmp_path / "alone", *layout()))
    assert sum(asked for asked, *_ in alone) > 50
    shared = [*layout(pp=1, dp=2), "parallelism.cp=2", "parallelism.ep=2"]
    for arguments in (layout(pp=2, vpp=2, ep=2, dp=2), shared):
        by_rank = run_ranks(
            needles, 4 if arguments != shared else 2, overrides(data, tmp_path / "other", *arguments)
        )
        for found in by_rank:
            assert torch.allclose(torch.tensor(found), torch.tensor(alone), rtol=1e-4, atol=1e-4)


@pytest.fixture
def chain(data: Path, tmp_path: Path) -> Path:
    """A chain of two short runs, the second of which starts from the first."""
    settings = {
        key: value for key, _, value in (each.partition("=") for each in SHRUNK) if key != "experiment"
    }
    settings |= {key: value for key, _, value in (each.partition("=") for each in layout())}
    settings |= {
        "data.dir": str(data),
        "train.steps": "8",
        "train.eval_interval": "4",
        "checkpoint.interval": "3",
        "optim.warmup": "2",
        "optim.decay": "2",
    }
    stages = {
        "first": {"experiment": "smoke", "overrides": settings},
        "second": {"experiment": "smoke", "start": "first", "overrides": {**settings, "train.seed": "5"}},
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"dir": str(tmp_path / "quiet"), "stages": stages}, sort_keys=False))
    return path


def command(chain: Path, folder: Path, *more: str) -> list[str]:
    """Train the chain."""
    return [sys.executable, "-m", "k25_train.recipes.stages", f"chain={chain}", f"dir={folder}", *more]


@pytest.mark.slow
def test_a_killed_chain_ends_in_the_same_losses(chain: Path, tmp_path: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    subprocess.run(command(chain, quiet), check=True)
    # 1. Killed in either stage, with all its processes, and started again.
    for stage, step in (("first", 5), ("second", 4)):
        kill_at(command(chain, killed), killed / stage, step)
    done = subprocess.run(command(chain, killed), check=True, capture_output=True, text=True).stdout
    assert "stage 1/2 first: done already" in done and "stage 2/2 second: goes on" in done
    for stage in ("first", "second"):
        assert without_times(rows(quiet / stage)) == without_times(rows(killed / stage)), stage
    assert (killed / "losses.png").stat().st_size > 10_000
    assert "first" in (killed / "table.txt").read_text()
    # 2. A stage that has lost what it starts from, or was trained otherwise, is refused.
    stages = compose_chain(load_chain(str(chain), [f"dir={killed}"]))
    check_order(stages)
    refused = subprocess.run(
        command(chain, killed, "second.optim.lr=1e-3"), check=False, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "optim.lr=0.005 then, 0.001 now" in refused.stderr
    last = Path(stages[0].last_checkpoint)
    (last / "manifest.json").unlink()
    assert not is_finished(stages[0])
    refused = subprocess.run(command(chain, killed), check=False, capture_output=True, text=True)
    assert refused.returncode == 2 and "--from first" in refused.stderr


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_chain(chain: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(chain, tmp_path / "x", "first.data.max_skipped_samples=0", "first.data.dir=nowhere"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "stage first failed with status" in done.stderr and "stage 2/2" not in done.stdout
