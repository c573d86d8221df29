"""A command made by `hydra_app`: what its user sees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, to_yaml
from tests.helpers.project_sources import REPO

COMMAND = '''
"""Doubles the seed."""
from k25_train.compose.command_line import hydra_app
from k25_train.errors import DataError

def task(config):
    if config.train.seed == 5:
        raise DataError("a.tar: cut short")
    print("seed", config.train.seed * 2)

main = hydra_app(task)
if __name__ == "__main__":
    main()
'''


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A command in an empty folder."""
    path = tmp_path / "double.py"
    path.write_text(COMMAND)
    return path


def run(command: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own folder."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run(
        [sys.executable, str(command), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=command.parent,
        env=env,
    )


def test_runs_and_leaves_nothing_behind(command: Path) -> None:
    done = run(command, "experiment=smoke", "train.seed=21")
    assert (done.returncode, done.stdout) == (0, "seed 42\n"), done.stderr
    assert list(command.parent.iterdir()) == [command]


def test_a_saved_configuration_takes_the_place_of_an_experiment(command: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(compose(["experiment=smoke", "train.seed=21"])))
    done = run(command, "--config", str(saved))
    assert (done.returncode, done.stdout) == (0, "seed 42\n"), done.stderr
    done = run(command, "--config", str(saved), "train.seed=7", "cluster.name=x")
    assert (done.returncode, done.stdout) == (0, "seed 14\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config"], "ConfigError: --config: is not followed by a value: write --config FILE"),
        (["--config", "none.yaml"], "ConfigError: none.yaml: cannot be read as a configuration"),
        (["--config", "saved.yaml", "train.stpes=1"], "train.stpes=1\n      is not a key of train"),
        (["--config", "saved.yaml", "train.seed=5"], "DataError: a.tar: cut short"),
    ],
)
def test_a_saved_configuration_is_checked_as_any_other(
    command: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "saved.yaml").write_text(to_yaml(compose(["experiment=smoke"])))
    done = run(command, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_help_needs_no_experiment(command: Path) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Doubles the seed.\n")
    assert "|k25_pretrain_4k|k25_projector|k25_vit|moonlight_16b|published|" in done.stdout
    assert "train: steps, seq_len," in done.stdout


def test_config_can_be_printed(command: Path) -> None:
    done = run(command, "experiment=smoke", "--cfg", "job")
    assert done.returncode == 0
    assert "seq_len:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "experiment\n      must be chosen"),
        (["experiment=smoke", "foo=1"], "foo=1\n      is not a key"),
        (["experiment=smoke", "train.seed=5"], "DataError: a.tar: cut short"),
    ],
)
def test_errors_of_the_user_have_no_traceback(command: Path, arguments: list[str], message: str) -> None:
    done = run(command, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_one_rank_names_the_rank(command: Path) -> None:
    done = run(command, "experiment=smoke", "train.seed=5", RANK="3")
    assert done.stderr == "rank 3: DataError: a.tar: cut short\n"
