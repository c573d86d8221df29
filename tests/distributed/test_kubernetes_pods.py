"""Two pods of a JobSet as processes of this machine: they train, save when they have to go, and go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from k25_train.compose.resolve import compose, to_yaml
from launch.kubernetes.outcomes import FINISHED, STOPPED
from launch.kubernetes.pod import INDEX
from launch.kubernetes.pod_spec import FIRST_NODE
from tests.helpers.interrupted_runs import long_run, rows, without_times
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.runs import fit, layout

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def start_pods(config: Path) -> list["subprocess.Popen[bytes]"]:
    """Both pods, the second one first."""
    command = [sys.executable, "-m", "launch.kubernetes.pod", str(config)]
    pods = []
    for index in (1, 0):
        variables = os.environ | {INDEX: str(index), FIRST_NODE: "localhost", "OMP_NUM_THREADS": "1"}
        pods.append(subprocess.Popen(command, cwd=REPO, env=variables))
    return pods[::-1]


def write_config(path: Path, arguments: list[str], **section: object) -> None:
    """The file that the pods' ConfigMap would hold."""
    values = yaml.safe_load(to_yaml(compose(arguments)))
    own = yaml.safe_load((REPO / "conf/cluster/site_kubernetes.yaml").read_text())["kubernetes"]
    values["cluster"]["kubernetes"] = own | section
    path.write_text(yaml.safe_dump(values))


def test_pods_that_have_to_go_save_and_the_next_ones_go_on(data: Path, tmp_path: Path) -> None:
    run_ranks(fit, 2, long_run(data, tmp_path / "alone", *layout(ep=2, dp=2)))
    nodes = [*layout(ep=2, dp=2), "cluster.nodes=2", "cluster.gpus_per_node=1"]
    arguments, config = long_run(data, tmp_path / "run", *nodes), tmp_path / "config.yaml"
    # The next one, for training, is handed out next.
    port, _ = free_port(), free_port()
    write_config(config, arguments, preflight=True, port=port)
    metrics = tmp_path / "run/metrics.jsonl"
    # 1. The second pod has to go: a node is drained.
    pods = start_pods(config)
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert [pod.poll() for pod in pods] == [None, None]
        time.sleep(0.05)
    pods[1].send_signal(signal.SIGTERM)
    assert [pod.wait(120) for pod in pods] == [STOPPED, STOPPED]
    # 2. The JobSet starts both again.
    assert [pod.wait(240) for pod in start_pods(config)] == [FINISHED, FINISHED]
    assert without_times(rows(tmp_path / "run")) == without_times(rows(tmp_path / "alone"))
