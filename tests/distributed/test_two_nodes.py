"""The compose file's commands on two machines with separate addresses, without a container runtime."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.interrupted_runs import rows, without_times
from tests.helpers.network_nodes import start_on, two_machines
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port
from tests.helpers.slurm_cluster import running_slurm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((REPO / "docker" / "compose.yaml").read_text())[
    "services"
]
TIMEOUT_S = 400.0
SHORT = "train.steps=4 train.eval_interval=4 checkpoint.interval=4 optim.warmup=1 optim.decay=1"


def run_services(folder: Path, replace_module: str, *overrides: str) -> str:
    """Run every service's command on a separate machine and return what both print.

    `/runs` is `folder`, torchrun the one of this environment, and the module may be another.
    """
    logs = {name: folder / f"{name}.log" for name in SERVICES}
    folder.mkdir()
    with two_machines(tuple(SERVICES)) as spaces, contextlib.ExitStack() as stack:
        processes = []
        for name, service in SERVICES.items():
            first, *words = service["command"]
            assert first == "python"
            words = [
                word.replace("/runs", str(folder)).replace("k25_train.train", replace_module)
                for word in words
            ]
            log = stack.enter_context(logs[name].open("w"))
            command = [sys.executable, *words, *overrides]
            process = start_on(spaces[name], name, command, service["environment"], REPO, log)
            processes.append(process)
            # In any case, nothing outlives the test.
            stack.callback(end, process)
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    printed = "\n".join(log.read_text() for log in logs.values())
    assert statuses == [0, 0], printed
    return printed


def end(process: subprocess.Popen[str]) -> None:
    """End a machine's processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def train_on_one(run: Path, overrides: Sequence[str]) -> None:
    """The same four ranks on one machine."""
    words = [
        "--standalone",
        "--nproc-per-node=4",
        "-m",
        "k25_train.train",
        "experiment=smoke",
        f"run.dir={run}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *words, *overrides], cwd=REPO, env=environment, check=True, capture_output=True
    )


def test_two_nodes_train_as_one(data: Path, tmp_path: Path) -> None:
    overrides = [*SHORT.split(), f"data.dir={data}", "train.eval_sequences=8"]
    run_services(tmp_path / "two", "k25_train.train", *overrides)
    train_on_one(tmp_path / "one", overrides)
    assert without_times(rows(tmp_path / "two" / "smoke")) == without_times(rows(tmp_path / "one"))


def test_preflight_compares_two_nodes(tmp_path: Path) -> None:
    printed = run_services(tmp_path / "runs", "launch.preflight")
    assert "preflight passed on 2 node(s)" in printed
    report = json.loads((tmp_path / "runs" / "smoke" / "preflight.json").read_text())
    assert sorted(report["nodes"]) == ["node0", "node1"]
    found = {one["check"]: one for one in report["nodes"]["node1"]["findings"]}
    assert "between nodes" in found["connections"]["found"]
    assert "against node0" in found["clock"]["found"]
    assert found["versions"]["verdict"] == "passed"


def test_preflight_over_srun(tmp_path: Path) -> None:
    """One task per node becomes torchrun; the report has SLURM's names of the nodes."""
    sizes = [
        "cluster=local_slurm",
        "cluster.nodes=2",
        "cluster.gpus_per_node=2",
        f"run.dir={tmp_path / 'run'}",
    ]
    task = 'exec "$0" -m launch.torchrun --preflight --node "$SLURM_NODEID" "$@"'
    first = f"--first-node=127.0.0.1:{free_port()}"
    with running_slurm(tmp_path / "slurm") as cluster:
        srun = [
            "srun",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--overcommit",
            "bash",
            "-c",
            task,
            sys.executable,
        ]
        printed = cluster.ask(*srun, first, "experiment=smoke", *sizes)
        names = cluster.ask("sinfo", "--noheader", "--Node", "--format=%N", "--partition=main").split()
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert sorted(report["nodes"]) == sorted(names)
    assert "preflight passed on 2 node(s)" in printed
