"""What preflight finds on a node: nothing bad on a sound one, and every check reports on every node."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Finding, Verdict, worst
from launch.preflight.node import judge_node, read_node
from tests.helpers.recorded_node import (
    GIB,
    RecordedNode,
    examine,
)


def test_a_sound_node_passes_every_check(recorded: RecordedNode, config: Config) -> None:
    findings = examine(recorded, config)
    assert {finding.verdict for finding in findings} == {Verdict.passed}, "\n".join(map(str, findings))
    found = {finding.check: finding.found for finding in findings}
    assert found["GPU count"] == "8 x NVIDIA H800"
    assert found["NVLink"] == "NV8 between all GPUs"
    assert found["GPU to network card"] == "all 8 GPUs have one by PIX or PXB"
    assert found["network speed"] == "8 cards of 400 Gb/s, 400 GB/s per node"
    assert found["RoCE v2 GID"].startswith("mlx5_0: 3 (10.10.0.5), mlx5_1: 3 (10.10.1.5)")
    assert found["traffic class"] == "106 is DSCP 26, on lossless priority 3"
    assert found["RDMA loss"] == "none while measuring"
    assert found["Ethernet loss"] == "none while measuring, 0 pause frames"
    assert found["receive buffers"] == "243,072 bytes, not shared"
    assert found["card PCIe link"] == "32 GT/s x16 each"
    assert found["card PCIe requests"] == "MaxReadReq 4096 bytes, relaxed ordering on"
    assert found["GPUDirect RDMA"] == "nvidia-peermem is loaded"
    assert found["link flaps"] == "at most 1 since boot"
    assert found["bit errors"] == "none after correction; before correction at most 2e-08"
    assert found["error correction"] == "RS on all cards"
    assert found["congestion control"].startswith("on for priority 3; np_cnp_sent +0, np_ecn_marked")


def test_every_check_speaks_on_a_node_without_gpus_and_rdma(tmp_path: Path, config: Config) -> None:
    """The names are the same as on a sound node, each judged or skipped with a reason."""
    checks = [finding.check for finding in examine(RecordedNode(tmp_path / "sound"), config)]
    bare = RecordedNode(tmp_path / "bare", num_gpus=0)
    bare.outputs, bare.environment = {}, {}
    local = compose(["experiment=smoke"])
    findings = judge_node(read_node(bare.system, "laptop", local), local, one_bytes=GIB)
    assert sorted(finding.check for finding in findings) == sorted(checks)
    by_check = {finding.check: finding for finding in findings}
    assert by_check["GPU count"].verdict is Verdict.skipped
    assert by_check["GPU count"].found == "cluster local computes on CPUs (cluster.device is cpu)"
    assert by_check["RoCE v2 GID"].found == "cluster local has no RDMA fabric (cluster.fabric is null)"
    assert worst(findings) is Verdict.passed


def test_checkpoints_that_the_run_has_need_no_more_room(recorded: RecordedNode, config: Config) -> None:
    """Else no run whose disk holds just its checkpoints could be started again after a fault."""
    recorded.free_bytes = 35_000 * GIB
    folder = Path(config.run.dir).absolute().relative_to("/")
    for step in (100, 200):
        recorded.write(f"{folder}/checkpoints/step_{step}/rank_0.pt", "")
        os.truncate(recorded.root / folder / f"checkpoints/step_{step}/rank_0.pt", 13_000 * GIB)
    (finding,) = [one for one in examine(recorded, config) if one.check == "disk of the run"]
    assert finding.verdict is Verdict.passed
    assert (
        "35,000.0 GiB free at " in finding.found and "26,000.0 GiB used by its checkpoints" in finding.found
    )


def test_the_room_is_that_of_the_checkpoints(recorded: RecordedNode, config: Config) -> None:
    recorded.free_bytes = 35_000 * GIB
    recorded.write("scratch/mine/step_100/rank_0.pt", "")
    os.truncate(recorded.root / "scratch/mine/step_100/rank_0.pt", 13_000 * GIB)

    def disk(place: str) -> Finding:
        checkpoint = replace(config.checkpoint, dir=place)
        found = examine(recorded, replace(config, checkpoint=checkpoint))
        return next(one for one in found if one.check == "disk of the run")

    assert "free at /scratch/mine, 13,000.0 GiB used by its checkpoints" in disk("/scratch/mine").found
    assert disk("s3://bucket/run").verdict is Verdict.skipped


@pytest.mark.parametrize("address", [None, "127.0.1.1"])
def test_a_name_that_stands_for_loopback(recorded: RecordedNode, address: str | None) -> None:
    """Debian writes the host's name next to 127.0.1.1: gloo would listen where no other node reaches it."""
    recorded.environment = {"RANK": "0", "GLOO_BY_HAND": "1"}
    config = compose(["experiment=smoke", "cluster.nodes=2", "cluster.gpus_per_node=2"])
    assert [one.verdict for one in examine(recorded, config) if one.check == "host name"] == [Verdict.passed]
    recorded.address = address
    (finding,) = [one for one in examine(recorded, config) if one.verdict is Verdict.warned]
    assert finding.check == "host name"
    assert f"resolves to {address or 'nothing'}" in finding.found
    assert "/etc/hosts" in finding.remedy


def test_output_of_another_form_is_reported(recorded: RecordedNode, config: Config) -> None:
    recorded.outputs["nvidia-smi --query-gpu"] = "0, NVIDIA H800\n"
    (finding, *_) = [one for one in examine(recorded, config) if one.verdict is Verdict.failed]
    assert "expected 8 values" in finding.found
