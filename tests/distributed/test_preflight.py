"""Preflight over real gloo ranks: it measures the groups of training, and names slow and missing ranks."""

import contextlib
import io
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight import coordination, job, measure
from launch.preflight.coordination import join
from launch.preflight.groups import expert_groups, pipeline_groups
from launch.preflight.system import System
from tests.helpers.ranks import RankContext, RankError, free_port, run_ranks

pytestmark = pytest.mark.distributed

SIZES = ["parallelism.pp=2", "parallelism.vpp=1", "parallelism.overlap_expert_comm=false"]
SIZES += ["parallelism.delay_wgrad=false", "model.num_experts=16"]
RANKS_PER_NODE = 4
WAIT_S = 2.0


@dataclass(frozen=True)
class Trouble:
    """What is wrong with one rank."""

    rank: int = -1
    delay_s: float = 0.0
    """Added to each of its exchanges."""
    hangs: bool = False
    """Whether it hangs in its third exchange."""
    cannot_compute: bool = False
    """Whether its device fails."""
    other_job: bool = False
    """Whether its node has another learning rate, and a disk of its own for checkpoints."""


def config_of(folder: Path, world_size: int, ep: int) -> Config:
    """The smoke job on nodes of 4 ranks, in two stages, made once for all ranks."""
    sizes = [*SIZES, f"parallelism.ep={ep}", f"cluster.nodes={world_size // RANKS_PER_NODE}"]
    return compose(["experiment=smoke", *sizes, "train.global_batch_size=32", f"run.dir={folder}"])


def preflight(context: RankContext, config: Config, trouble: Trouble) -> tuple[bool, str]:
    """Run it and return what rank 0 prints."""
    os.environ.update(LOCAL_RANK=str(context.rank % RANKS_PER_NODE), LOCAL_WORLD_SIZE=str(RANKS_PER_NODE))
    if trouble.hangs:
        measure.ANSWER_TIMEOUT_S, job.MEASURE_TIMEOUT_S, coordination.LEAVE_TIMEOUT_S = (
            WAIT_S,
            3 * WAIT_S,
            1.0,
        )
    measure.LOADS["cpu"] = replace(measure.LOADS["cpu"], seconds=0.05, message_bytes=2**16)
    if context.rank == trouble.rank:
        afflict(trouble, Path(config.run.dir))
    if trouble.other_job and context.rank // RANKS_PER_NODE == trouble.rank // RANKS_PER_NODE:
        config = replace(config, optim=replace(config.optim, lr=1.0))
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", f"{config.run.dir}/checkpoints"], check=True)
    shown = io.StringIO()
    host = f"node-{context.rank // RANKS_PER_NODE}"
    console, folder = Console(file=shown, width=200), Path(config.run.dir)
    is_sound = job.run_preflight(config, join(30.0), System(), host, console, folder)
    return is_sound, shown.getvalue()


def afflict(trouble: Trouble, folder: Path) -> None:
    """Apply the trouble to this rank's exchanges, at most until the report is in the folder."""
    if trouble.cannot_compute:
        measure.measure_gemm = broken_device
    original: Any = measure._exchange
    calls = []

    def exchange(*arguments: Any) -> None:
        calls.append(1)
        while trouble.hangs and len(calls) == 3:
            time.sleep(0.1)
            if (folder / "preflight.json").exists():
                os._exit(0)
        time.sleep(trouble.delay_s)
        original(*arguments)

    measure._exchange = exchange


def broken_device(*_: Any) -> float:
    """Replacement for a measurement: fails like a GPU that fell off the bus."""
    raise RuntimeError("CUDA error: unspecified launch failure\nand much advice")


def findings_of(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Node -> check -> finding, from the report."""
    report = json.loads((folder / "preflight.json").read_text())
    return {
        node: {finding["check"]: finding for finding in own["findings"]}
        for node, own in report["nodes"].items()
    }


@pytest.mark.parametrize(
    ("world_size", "ep"), [(8, 4), pytest.param(32, 16, marks=pytest.mark.slow)], ids=["ep4", "ep16"]
)
def test_the_groups_of_training_are_measured(world_size: int, ep: int, tmp_path: Path) -> None:
    """Two stages; ranks that share experts, or are in neighbouring stages, are measured once."""
    config = config_of(tmp_path, world_size, ep)
    results = run_ranks(preflight, world_size, config, Trouble(), timeout_s=500.0)
    assert all(is_sound for is_sound, _ in results), results[0][1]
    assert "GB/s between nodes" in results[0][1]
    assert f"GB/s in groups of {ep}" in results[0][1]
    found = findings_of(tmp_path)
    assert sorted(found) == sorted(f"node-{number}" for number in range(world_size // RANKS_PER_NODE))
    for node in found.values():
        assert node["measurement"]["verdict"] == "passed"
        assert node["versions"]["verdict"] == "passed"
        assert node["clock"]["verdict"] == "passed"
        for check in ("configuration", "code", "packages", "environment", "shared folder"):
            assert node[check]["verdict"] == "passed", node[check]
        assert "what each node writes is read on the others" in node["shared folder"]["found"]
        assert re.fullmatch(r"writes [\d.e+-]+ GB/s, reads .* GB/s", node["speed of the run folder"]["found"])
    assert [path.name for path in tmp_path.iterdir()] == ["preflight.json"]
    report = json.loads((tmp_path / "preflight.json").read_text())
    ranks = {rank: one for own in report["nodes"].values() for rank, one in own["facts"]["measured"].items()}
    met = {tuple(link["pair"]) for one in ranks.values() for link in one["links"]}
    pairs = {(a, b) for a in range(world_size) for b in range(a + 1, world_size)}
    assert met == {(a, b) for a, b in pairs if a // ep == b // ep or b - a == world_size // 2}


def test_a_slow_rank_and_a_node_of_another_job_are_named(tmp_path: Path) -> None:
    """One has other settings, as at the start of a run, and would write into a folder of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    (tmp_path / "checkpoints").mkdir()
    results = run_ranks(
        preflight, 8, config_of(tmp_path, 8, ep=4), Trouble(rank=5, delay_s=0.3, other_job=True)
    )
    assert not results[0][0]
    found = findings_of(tmp_path)
    assert found["node-1"]["connections"]["verdict"] == "warned"
    assert "rank 5: at best" in found["node-1"]["connections"]["found"]
    text = found["node-1"]["configuration"]["found"]
    assert re.search(
        r"optim.lr: .* on node 0 \(host node-0, ranks 0-3\), 1.0 on node 1 \(host node-1, ra", text
    )
    assert found["node-1"]["shared folder"]["found"].endswith(
        "checkpoints/: does not see what rank 0 has written there"
    )
    assert {found["node-1"][check]["verdict"] for check in ("configuration", "shared folder")} == {"failed"}
    assert (
        found["node-0"]["configuration"]["verdict"] == found["node-0"]["shared folder"]["verdict"] == "passed"
    )
    assert found["node-0"]["speed of the run folder"]["verdict"] == "skipped"


def test_a_rank_that_does_not_continue_is_named(tmp_path: Path) -> None:
    """The others give up on it, and the report names its node alone."""
    trouble = Trouble(rank=6, hangs=True)
    # The rank itself returns no result.
    with contextlib.suppress(RankError):
        run_ranks(preflight, 8, config_of(tmp_path, 8, ep=4), trouble, timeout_s=60.0)
    found = findings_of(tmp_path)
    assert found["node-1"]["measurement"]["verdict"] == "failed"
    assert "ranks [6] did not continue" in found["node-1"]["measurement"]["found"]
    assert found["node-0"]["measurement"]["verdict"] in ("skipped", "passed")


def test_a_device_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    """No rank connects, so no other looks broken."""
    results = run_ranks(preflight, 8, config_of(tmp_path, 8, ep=4), Trouble(rank=6, cannot_compute=True))
    assert not results[0][0]
    found = findings_of(tmp_path)
    measurement = found["node-1"]["measurement"]
    assert measurement["verdict"] == "failed"
    assert "rank 6: computing: CUDA error: unspecified launch failure" in measurement["found"]
    assert "advice" not in measurement["found"]
    assert found["node-0"]["measurement"]["verdict"] == "skipped"
    assert found["node-0"]["measurement"]["found"] == "broken off because of node-1"
    assert found["node-0"]["reachable"]["verdict"] == "skipped"
    assert found["node-0"]["matrix products"]["verdict"] == "passed"
    assert found["node-0"]["connections"]["found"] == "measuring broke off earlier"


def silent_node(context: RankContext, config: Config, hosts: list[str] | None) -> str:
    """Two nodes with one rank each, of which the second never arrives."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    job.NODE_TIMEOUT_S = 1.0
    if context.rank == 1:
        return ""
    coordinator = join(30.0, hosts)
    coordination.LEAVE_TIMEOUT_S = 1.0
    shown = io.StringIO()
    console, folder = Console(file=shown, width=200), Path(config.run.dir)
    assert not job.run_preflight(config, coordinator, System(), "node-0", console, folder)
    return shown.getvalue()


@pytest.mark.parametrize(("hosts", "name"), [(None, "node 1"), (["node-0", "gpu17"], "gpu17")])
def test_a_silent_node_is_named_and_nothing_is_measured(
    tmp_path: Path, hosts: list[str] | None, name: str
) -> None:
    sizes = ["parallelism=serial", "cluster.nodes=2", "cluster.gpus_per_node=1"]
    config = compose(["experiment=smoke", *sizes, f"run.dir={tmp_path}"])
    shown, _ = run_ranks(silent_node, 2, config, hosts)
    assert "the node with ranks 1 to 1 reported nothing" in shown
    assert f"preflight FAILED on 1 of 2 node(s): {name}\n" in shown
    assert "matrix products" not in shown


def unreachable_node(context: RankContext, config: Config) -> str:
    """Four nodes of one rank, of which the third listens on an unreachable port."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    if context.rank == 2:
        closed = contextlib.nullcontext(f"127.0.0.1 {free_port()}")
        job.listening = lambda _interface: closed  # type: ignore[assignment]
    measure.open_group = must_not_connect
    shown = io.StringIO()
    console, folder = Console(file=shown, width=200), Path(config.run.dir)
    job.run_preflight(config, join(30.0), System(), f"node-{context.rank}", console, folder)
    return shown.getvalue()


def must_not_connect(*_: Any) -> None:
    """Replacement for a function that must not be called."""
    raise AssertionError("a node that cannot be reached was waited for")


def test_a_node_that_others_cannot_reach_is_named_alone(tmp_path: Path) -> None:
    """It is named before any rank waits for it."""
    sizes = ["parallelism=serial", "cluster.nodes=4", "cluster.gpus_per_node=1", "train.global_batch_size=8"]
    config = compose(["experiment=smoke", *sizes, f"run.dir={tmp_path}"])
    shown = run_ranks(unreachable_node, 4, config)[0]
    assert "preflight FAILED on 1 of 4 node(s): node-2" in shown
    found = findings_of(tmp_path)
    assert "Connection refused" in found["node-2"]["reachable"]["found"]
    assert found["node-0"]["reachable"]["verdict"] == "passed"
    assert found["node-0"]["matrix products"]["verdict"] != "skipped"


def test_groups_are_those_of_training() -> None:
    config = compose(["experiment=smoke", "cluster.gpus_per_node=8", "train.global_batch_size=16"])
    (rank_0, *_) = results = run_ranks(groups_of_training, 8, config)
    assert rank_0 == ((0, 1), (0, 4))
    for rank, (experts, pipeline) in enumerate(results):
        assert experts in expert_groups(8, 2)
        assert rank in experts
        assert pipeline in pipeline_groups(8, 2)
        assert rank in pipeline


def groups_of_training(context: RankContext, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global ranks of this rank's expert-parallel and pipeline groups, as training builds them."""
    from k25_train.plan.pipeline import layout_of
    from parallel.megatron.platform import use_platform
    from parallel.topology import build_topology, start_process_group, stop_process_group

    device = use_platform("cpu")
    start_process_group(device, 60.0)
    topology = build_topology(config.parallelism, layout_of(config), device)
    found = [tuple(dist.get_process_group_ranks(group)) for group in (topology.groups.ep, topology.groups.pp)]
    stop_process_group()
    return found[0], found[1]


def test_clocks_are_compared() -> None:
    (offsets, *_) = run_ranks(compare_clocks, 3)
    assert offsets is not None
    assert set(offsets) == {1, 2}
    for rank, offset in offsets.items():
        assert abs(offset.seconds - 100.0 * rank) <= offset.uncertainty_s


def compare_clocks(context: RankContext) -> Any:
    """Each rank is a node whose clock is 100 s further ahead."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    coordinator = join(30.0)
    if coordinator.is_first:
        offsets = coordinator.measure_clocks(10.0)
        coordinator.leave(10.0)
        return offsets
    real = time.time
    time.time = lambda: real() + 100.0 * context.rank  # type: ignore[assignment]
    coordinator.answer_clock(10.0)
    coordinator.leave(10.0)
    return None
