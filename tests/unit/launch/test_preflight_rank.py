"""Tasks of srun become ranks of the preflight, each the one that training has there."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from launch import preflight_rank
from launch.submission import Submission


@pytest.mark.parametrize(
    ("node", "local_rank", "rank", "log", "clears"),
    [(0, 0, "0", "preflight.log", True), (1, 0, "4", "node_n9.log", True), (1, 2, "6", "node_n9.log", False)],
)
def test_a_task_becomes_its_rank(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    node: int,
    local_rank: int,
    rank: str,
    log: str,
    clears: bool,
) -> None:
    values = dict.fromkeys(Submission.__dataclass_fields__) | {"ranks_per_node": 4, "max_log_bytes": 0}
    Submission(**values).write(tmp_path)  # type: ignore[arg-type]
    folder = tmp_path / "attempts/3"
    logs: list[Path] = []
    cleared: list[tuple[Path, str]] = []
    modules: list[str] = []
    monkeypatch.setattr(os, "environ", {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)})
    monkeypatch.setattr(sys, "argv", ["preflight_rank", str(folder), str(tmp_path), "n1,n9", "n1", "29500"])
    monkeypatch.setattr(preflight_rank, "redirect", logs.append)
    monkeypatch.setattr(preflight_rank, "end_leftovers", lambda *of: cleared.append(of))
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: modules.append(name))

    preflight_rank.main()

    assert modules == ["launch.preflight"]
    assert logs == [folder / log]
    assert cleared == ([(tmp_path / "attempts", "3")] if clears else [])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == [rank, "8", str(local_rank), "4", "n1", "29500"]
    assert sys.argv[1:] == [
        "--config", f"{tmp_path}/submit.yaml", "--report", str(folder), "--node-names", "n1,n9",
        "cluster.nodes=2",
    ]  # fmt: skip
