"""Ray around a run: its command lines, its script, and that nothing of it is left."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from launch.ray import __main__ as command
from launch.ray.cluster import RayCluster, running, token_in
from launch.ray.plan import HEAD, WORKER, Place, Plan, Step, here, of_job, ray_start, variables, without_ray
from launch.ray.ready import RayClusterError
from launch.sbatch import render
from launch.submission import Submission
from tests.helpers.project_sources import REPO
from tests.helpers.shellcheck import complaints

GOLDEN = REPO / "tests/golden/sbatch/ray.sbatch"
PLACE = Place("10.0.0.1", "29510")
SLEEPS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
NOTHING = [sys.executable, "-c", ""]


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


def submission(**changes: object) -> Submission:
    """A run of three nodes."""
    facts: dict[str, object] = dict.fromkeys(Submission.__dataclass_fields__, 0)
    facts |= {"run": "/runs/x", "python": "py", "node_start": ["start"], "container": ["--container-image=i"]}
    return Submission(**facts | {"cpus_per_task": None, "step_options": ["--mpi=none"]} | changes)  # type: ignore[arg-type]


def test_a_job_has_a_head_on_its_first_node_and_one_step_for_all_others() -> None:
    plan = of_job(submission(), ["n1", "n2", "n3"], PLACE)
    head, workers = (list(step.command) for step in plan.steps)
    assert "--nodelist=n1" in head and head[-4:] == ["launch.ray.node", HEAD, *PLACE]
    assert "--nodelist=n2,n3" in workers and workers[-4:] == ["launch.ray.node", WORKER, *PLACE]
    for step in (head, workers):
        # srun takes the last of two options: a lost node must not end the others' Ray.
        assert step.index("--no-kill") > step.index("--no-kill=off")
        assert step[step.index("--container-image=i") :][1:4] == ["start", "py", "-m"]
    assert plan.ready[-5:-1] == ["launch.ray.ready", *PLACE, "3"] and "--nodelist=n1" in plan.ready


def test_a_job_of_one_node_has_a_head_alone() -> None:
    assert [step.name for step in of_job(submission(), ["n1"], PLACE).steps] == ["n1"]


def test_heads_decide_and_workers_follow() -> None:
    head, worker = (ray_start("py", role, *PLACE, "/tmp/f") for role in (HEAD, WORKER))
    assert {"--head", "--port=29510", "--node-ip-address=10.0.0.1", "--temp-dir=/tmp/f"} <= {*head}
    assert "--address=10.0.0.1:29510" in worker and not {"--head", "--temp-dir=/tmp/f"} & {*worker}
    # The ranks have the accelerators.
    assert "--num-gpus=0" in head and "--num-gpus=0" in worker and head[-1] == worker[-1] == "--block"


def test_a_shell_that_speaks_of_another_cluster_is_not_listened_to() -> None:
    assert without_ray({"RAY_ADDRESS": "elsewhere:1", "HOME": "/h"}) == {"HOME": "/h"}
    assert variables("/t")["RAY_AUTH_MODE"] == "token" and variables("/t")["RAY_AUTH_TOKEN_PATH"] == "/t"


def test_the_token_is_its_users_alone_and_goes(tmp_path: Path) -> None:
    with token_in(tmp_path) as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) == 64
    assert not [*tmp_path.iterdir()]


def test_the_script_of_a_job_is_the_golden_file(tmp_path: Path) -> None:
    config = compose(["experiment=smoke", "cluster=local_slurm"])
    script = render(config, Path("/runs/example"), Path("/code"), "/env/bin/python", "launch.ray.job")
    path = tmp_path / GOLDEN.name
    path.write_text(script)
    assert complaints([path]) == ""
    assert script == GOLDEN.read_text(), f"if the change is meant: cp {path} {GOLDEN}"


def test_a_cluster_is_gone_behind_its_context(tmp_path: Path) -> None:
    plan = Plan([Step("a", SLEEPS), Step("b", SLEEPS)], NOTHING, 2)
    with pytest.raises(KeyError), running(plan, os.environ, tmp_path, tmp_path / "log") as cluster:
        cluster.wait(lambda: False)
        pids = [process.pid for _, process in cluster._running]
        assert all(map(is_alive, pids))
        raise KeyError
    assert not any(map(is_alive, pids)) and [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_head_that_ends_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    says = [sys.executable, "-c", "print('no port is free')"]
    cluster = RayCluster(Plan([Step("a", says)], SLEEPS, 1), os.environ, tmp_path / "log")
    cluster.start()
    with pytest.raises(RayClusterError, match="no port is free"):
        cluster.wait(lambda: False)
    cluster.close()


def test_nodes_that_do_not_come_are_an_error(tmp_path: Path) -> None:
    fails = [sys.executable, "-c", "raise SystemExit('1 of 2 nodes')"]
    with (
        pytest.raises(RayClusterError, match="1 of 2 nodes"),
        running(Plan([Step("a", SLEEPS)], fails, 2), os.environ, tmp_path, tmp_path / "log") as cluster,
    ):
        cluster.wait(lambda: False)


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    plan = Plan([Step("a", SLEEPS)], SLEEPS, 1)
    with running(plan, os.environ, tmp_path, tmp_path / "log") as cluster:
        cluster.wait(lambda: True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_node_that_is_told_or_loses_its_parent_leaves_no_process(number: int, tmp_path: Path) -> None:
    # What a node runs starts another, in whose name it dies.
    inner = f"import subprocess, sys; subprocess.Popen({SLEEPS!r}); import time; time.sleep(60)"
    node = (
        "import sys; from launch.ray.node import run_until_told; "
        f"run_until_told([sys.executable, '-c', {inner!r}])"
    )
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {node!r}]); p.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPO, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(number)
        # The pipe is closed when the last of them has ended.
        began = time.monotonic()
        process.stdout.read()
        assert time.monotonic() - began < 30


def test_several_nodes_need_slurm() -> None:
    with pytest.raises(ConfigError, match="has no SLURM to start them"):
        command.check_nodes(compose(["experiment=smoke", "cluster.nodes=2", "train.global_batch_size=16"]))


def test_this_machine_alone() -> None:
    plan = here("py", PLACE)
    assert [*plan.steps[0].command] == ["py", "-m", "launch.ray.node", HEAD, *PLACE] and plan.num_nodes == 1
