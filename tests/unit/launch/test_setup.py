"""A site's own lines of shell: run in order, before Python, and the first that fails is named."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from k25_train.errors import ConfigError
from launch.setup import batch_setup, check_setup, node_start

KEY = "cluster.slurm.setup"


def start(
    lines: Sequence[str], folder: Path, exports: Sequence[str] = (), **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a node's start in a folder; the ranks' command prints its argument and variables."""
    report = ["bash", "-c", 'echo "got $1"; env; pwd', "x", "a b; $HOME"]
    env = {"PATH": os.environ["PATH"], "HOSTNAME": "n3", **environment}
    command = [*node_start(KEY, lines, exports, str(folder)), *report]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)


def test_lines_change_the_environment_of_what_follows(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    # As modules and conda do: unset variables are read, and commands fail on the way.
    site.write_text("[ -z $NOT_THERE ]\nfalse\nexport FROM_SITE=yes\ntrue\n")
    done = start([f"source {site}  # ours", "cd /tmp && export TWO=2; export THREE=3"], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "got a b; $HOME", "the command gets its arguments as they are"
    assert {"FROM_SITE=yes", "TWO=2", "THREE=3"} <= set(lines)
    assert lines[-1] == str(tmp_path), "Python finds the code, wherever the lines went"


@pytest.mark.parametrize(
    "line", ["false", "no-such-module load x", "false  # why", "true; false", "source /not/there", "(exit 3)"]
)
def test_the_line_that_fails_is_named_and_nothing_else_runs(tmp_path: Path, line: str) -> None:
    done = start(["true", line, "export LATE=1"], tmp_path)
    assert done.returncode == 1 and "got" not in done.stdout
    assert done.stderr.splitlines()[-1] == f"n3: {KEY}.1 failed: {line}"


def test_a_module_does_not_change_what_the_cluster_file_says(tmp_path: Path) -> None:
    lines = ["export NCCL_IB_TC=0 NCCL_ALGO=Ring OMP_NUM_THREADS=96"]
    done = start(lines, tmp_path, ["export NCCL_IB_TC='106'", "export OMP_NUM_THREADS='1'"])
    found = set(done.stdout.splitlines())
    assert {"NCCL_IB_TC=106", "OMP_NUM_THREADS=1"} <= found
    assert not any(line.startswith("NCCL_ALGO") for line in found)


def test_the_batch_script_is_strict_again_afterwards(tmp_path: Path) -> None:
    script = tmp_path / "script"
    text = batch_setup(["echo $NOT_THERE", "true"])
    script.write_text(f"set -euo pipefail\n{text}\necho prepared\necho $NOT_THERE_EITHER\necho late\n")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode and done.stdout.split() == ["prepared"] and "NOT_THERE_EITHER" in done.stderr


def test_without_lines_there_is_nothing() -> None:
    assert batch_setup([]) == "" and node_start(KEY, [], ["export A=1"], "/code") == []


@pytest.mark.parametrize(
    "line", ["if true; then", "echo 'a", "} ; {", "done", "a && ", "cat << END", "echo $(", "a |", "fi"]
)
def test_a_line_that_is_no_whole_command_is_refused_without_being_run(line: str) -> None:
    check_setup(KEY, ["module load cuda && source x; [ -z $A ] || true"])
    with pytest.raises(ConfigError, match=rf"^{KEY}\.0=.*: must be a complete command of bash \(bash: "):
        check_setup(KEY, [line])
