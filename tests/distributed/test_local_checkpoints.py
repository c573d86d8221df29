"""Checkpoints on the nodes' own disks, over ranks that have a folder per node."""

import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, override

import pytest

from k25_train.checkpoint import folders
from k25_train.checkpoint.__main__ import main
from tests.helpers.interrupted_runs import SHORT, rows, short_run, without_times
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, start_run

pytestmark = pytest.mark.distributed
TWO_NODES = ("cluster.nodes=2", "cluster.gpus_per_node=1")
CRASHED_IN = SHORT.num_steps - 1


@dataclass(frozen=True, slots=True)
class NodeContext(RankContext):
    """A rank alone on its node."""

    @override
    def environment(self) -> dict[str, str]:
        own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(self.rank)}
        return RankContext.environment(self) | own


def on_node(context: RankContext) -> NodeContext:
    return NodeContext(context.rank, context.world_size, context.port, context.device)


def fit_on_nodes(context: RankContext, arguments: Sequence[str], crash_in: int = 0) -> str:
    """Train; every rank dies in a step if one is given. Returns what is printed."""
    from k25_train.training import trainer

    train_step = trainer.train_step

    def dying(run: Any, step: int) -> Any:
        if step == crash_in:
            raise InterruptedError("the job is killed")
        return train_step(run, step)

    trainer.train_step = dying
    printed = StringIO()
    with redirect_stdout(printed):
        try:
            fit(on_node(context), arguments)
        except InterruptedError:
            assert crash_in
    return printed.getvalue()


def resumed_step(context: RankContext, arguments: Sequence[str]) -> tuple[int, str]:
    """The step that a start goes on from, and what it says."""
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    run = start_run(on_node(context), arguments)
    report = Report(run.config, is_main=run.is_main, device_name="CPU")
    printed = StringIO()
    with redirect_stdout(printed):
        return Trainer(run, report).keeper.resume(), printed.getvalue()


def local(folder: Path, *more: str) -> list[str]:
    """Every second step is kept on the nodes' disks; files are complete before the next step."""
    return [
        *layout(dp=2),
        *TWO_NODES,
        f"checkpoint.local_dir={folder}",
        "checkpoint.local_interval=2",
        "checkpoint.asynchronous=false",
        *more,
    ]


def steps_on(disks: Path, node: int) -> list[int]:
    [run] = disks.iterdir()
    return [folders.step_of(each) for each in folders.list_checkpoints(run / f"node_{node}")]


def test_a_crash_goes_on_from_the_nodes_and_a_lost_node_from_shared_storage(
    data: Path, tmp_path: Path
) -> None:
    whole, run, disks = tmp_path / "whole", tmp_path / "run", tmp_path / "disks"
    arguments = short_run(data, run, *local(disks))
    run_ranks(fit_on_nodes, 2, short_run(data, whole, *layout(dp=2), *TWO_NODES))
    run_ranks(fit_on_nodes, 2, arguments, CRASHED_IN)
    assert steps_on(disks, 0) == steps_on(disks, 1) == [6, 8]
    assert folders.step_of(folders.list_checkpoints(run / "checkpoints")[-1]) == SHORT.saved_at

    # A node's disk is lost: the checkpoint that all nodes share is there.
    lost = tmp_path / "lost"
    shutil.copytree(run, lost / "run")
    shutil.copytree(disks, lost / "disks")
    [node] = (lost / "disks").glob("*/node_1")
    shutil.rmtree(node)
    [(step, said), _] = run_ranks(resumed_step, 2, short_run(data, lost / "run", *local(lost / "disks")))
    assert step == SHORT.saved_at and "not on those of ranks 1" in said

    # All disks are there: nothing but the step that was cut off is done again.
    [said, _] = run_ranks(fit_on_nodes, 2, arguments)
    assert "3 steps newer than the shared one; going on from there" in said
    assert without_times(rows(run)) == without_times(rows(whole))
    last = f"checkpoints/step_{SHORT.num_steps}"
    assert main(["diff", str(run / last), str(whole / last)]) == 0


@pytest.mark.slow
def test_damage_and_another_layout_go_on_from_shared_storage(data: Path, tmp_path: Path) -> None:
    run, disks = tmp_path / "run", tmp_path / "disks"
    run_ranks(fit_on_nodes, 2, short_run(data, run, *local(disks)), CRASHED_IN)
    layouts = {
        "another layout": ["parallelism.pp=2", "parallelism.vpp=1"],
        "other nodes": ["cluster.nodes=4"],
    }
    for name, more in layouts.items():
        arguments = short_run(data, run, *local(disks, *more))
        [(step, _), *_] = run_ranks(resumed_step, 4 if "nodes" in more[0] else 2, arguments)
        assert step == SHORT.saved_at, name
    # The newest is read before the damage is found; then everything is loaded from elsewhere.
    [path] = disks.glob("*/node_1/step_8/rank_00001_0.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    [(step, said), _] = run_ranks(resumed_step, 2, short_run(data, run, *local(disks)))
    assert step == SHORT.saved_at and "rank_00001_0.safetensors" in said and "does not load" in said
    # Somebody goes back: the shared checkpoint is moved away, and what came after it counts no more.
    (run / f"checkpoints/step_{SHORT.saved_at}").rename(run / "checkpoints/aside")
    [(step, said), _] = run_ranks(resumed_step, 2, short_run(data, run, *local(disks)))
    assert step == 0 and "another course of the run" in said


@pytest.mark.slow
def test_a_disk_that_is_full_costs_the_run_nothing(data: Path, tmp_path: Path) -> None:
    (tmp_path / "disks").write_text("no folder")
    run = tmp_path / "run"
    [said, _] = run_ranks(fit_on_nodes, 2, short_run(data, run, *local(tmp_path / "disks")))
    assert "step 2 is not kept on the nodes' disks, and the run goes on" in said
    assert folders.step_of(folders.list_checkpoints(run / "checkpoints")[-1]) == SHORT.num_steps
