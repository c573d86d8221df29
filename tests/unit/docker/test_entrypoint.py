"""The image's entry point: which command it becomes, for which user, with which folders."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.image_files import DOCKER, stand_in
from tests.helpers.project_sources import REPO

ENTRYPOINT = str(DOCKER / "entrypoint.sh")
CACHES = ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder whose python and echo_all print their arguments, one per line."""
    stand_in(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    stand_in(tmp_path / "bin", "show", 'printf "%s\\n" "$@"; env')
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    return tmp_path


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point with a PATH that has stand-ins, and nothing else of this environment."""
    given = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    } | environment
    return subprocess.run([ENTRYPOINT, *words], env=given, capture_output=True, text=True, check=False)


MODULES = {
    "train": "launch.torchrun",
    "rank": "k25_train.train",
    "eval": "k25_train.eval",
    "plan": "k25_train.plan",
    "dryrun": "k25_train.dryrun",
    "data": "k25_train.data",
    "checkpoint": "k25_train.checkpoint",
    "convert": "k25_train.convert",
    "preflight": "launch.preflight",
    "status": "launch.status",
    "submit": "launch.slurm",
    "kubernetes": "launch.kubernetes",
    "revision": "launch.revision",
}


@pytest.mark.parametrize("name", MODULES)
def test_a_command_of_the_project(name: str, commands: Path) -> None:
    done = run(commands, name, "experiment=smoke", "run.dir=/runs/a b", "--json")
    assert done.stdout.splitlines() == [
        "-m",
        MODULES[name],
        "experiment=smoke",
        "run.dir=/runs/a b",
        "--json",
    ]


def test_every_command_exists_and_is_in_the_help(commands: Path) -> None:
    helped = re.findall(r"^  ([\w-]+)  ", run(commands, "help").stdout, re.MULTILINE)
    for module in MODULES.values():
        path = REPO / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    assert set(helped) == {*MODULES, "self-test", "sbom"}
    for name in helped:
        assert re.search(rf"^    (.* )?{name}( .*)?\) exec", Path(ENTRYPOINT).read_text(), re.MULTILINE), name


def test_any_other_command_is_run_as_it_is(commands: Path) -> None:
    assert run(commands, "show", "a b", "$HOME").stdout.splitlines()[:2] == ["a b", "$HOME"]
    assert run(commands, "bash", "-c", "exit 7").returncode == 7
    assert run(commands, "nothing-of-this-name").returncode == 127


@pytest.mark.parametrize("words", [(), ("help",), ("--help",), ("-h",)])
def test_help(words: tuple[str, ...], commands: Path) -> None:
    done = run(commands, *words)
    assert done.returncode == 0
    assert "usage: docker run IMAGE COMMAND" in done.stdout


def test_an_option_is_no_command(commands: Path) -> None:
    done = run(commands, "--nnodes=2")
    assert done.returncode == 2
    assert "--nnodes=2: a command comes first" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_the_command_takes_its_place(status: int, commands: Path) -> None:
    """The same process, so that signals and exit status are its own."""
    stand_in(commands / "bin", "python", f'sleep 60 & trap "kill %1; exit {status}" TERM; echo $$; wait')
    environment = {"PATH": f"{commands}/bin:/usr/bin:/bin", "HOME": str(commands / "home")}
    process = subprocess.Popen([ENTRYPOINT, "plan"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == status


def variables(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The environment that the command saw."""
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_caches_are_below_a_writable_home(commands: Path) -> None:
    found = variables(run(commands, "show"))
    assert found["HOME"] == str(commands / "home")
    assert all(found[name].startswith(str(commands / "home")) for name in CACHES)


@pytest.mark.parametrize("home", ["/", "/nonexistent"])
def test_without_a_writable_home_a_private_one_is_made(home: str, commands: Path) -> None:
    found = variables(run(commands, "show", HOME=home))
    folder = Path(found["HOME"])
    assert folder.parent == commands / "tmp" and folder.is_dir()
    # Others must not put libraries there that this process would load.
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(found[name].startswith(found["HOME"]) for name in CACHES)


def test_what_the_user_set_stays(commands: Path) -> None:
    own = {"TORCH_EXTENSIONS_DIR": "/a", "XDG_CACHE_HOME": "/b", "USER": "me"}
    found = variables(run(commands, "show", **own))
    assert {name: found[name] for name in own} == own
    assert found["HF_HOME"] == "/b/huggingface"


def test_a_user_without_a_name_gets_one(commands: Path) -> None:
    """torch's compiler asks for the user's name, and fails if there is none."""
    stand_in(commands / "bin", "id", '[ "$2" = --name ] && exit 1; echo 12345')
    found = variables(run(commands, "show"))
    assert (found["USER"], found["LOGNAME"]) == ("uid12345", "uid12345")


def test_without_any_writable_folder_it_says_what_is_missing(commands: Path) -> None:
    done = run(commands, "show", HOME="/", TMPDIR="/nonexistent")
    assert done.returncode == 2
    assert "/nonexistent" in done.stderr and "--tmpfs /tmp" in done.stderr


def test_own_files_are_found_from_anywhere(commands: Path) -> None:
    """`self-test` and `sbom` are files of the image."""
    text = Path(ENTRYPOINT).read_text()
    assert '"$code/docker/smoke.sh"' in text
    assert os.access(DOCKER / "smoke.sh", os.X_OK)
    assert "/usr/share/k25-train/sbom.spdx.json" in text
    assert "/usr/share/k25-train/sbom.spdx.json" in (DOCKER / "Dockerfile").read_text()
