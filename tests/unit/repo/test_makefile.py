"""The Makefile finds a Python that is new enough wherever one is, and says so where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.project_sources import REPO

TOOLS = ("sh", "make")


class Machine:
    """A PATH and a pyenv root that hold only the interpreters a test puts there."""

    def __init__(self, root: Path) -> None:
        """Make the folders, with the tools that make itself needs on PATH."""
        self.bin = root / "bin"
        self.pyenv = root / "pyenv"
        self.bin.mkdir()
        for tool in TOOLS:
            path = shutil.which(tool)
            assert path is not None, f"{tool} is needed to run this test"
            (self.bin / tool).symlink_to(path)

    def add(self, path: Path, version: str | None) -> Path:
        """Put an interpreter that runs as this version does; None is a pyenv shim that is not switched on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if version is None:
            script = f"echo 'pyenv: {path.name}: command not found' >&2; exit 127"
        else:
            major, minor = version.split(".")
            set_version = f"import sys; sys.version_info = ({major}, {minor}, 0)\n"
            script = f'exec {sys.executable} -c "{set_version}$2"'
        path.write_text(f"#!{shutil.which('sh')}\n{script}\n")
        path.chmod(0o755)
        return path

    def found(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Ask the Makefile which Python it would use."""
        command = ["make", "--silent", "--no-print-directory", "-C", str(REPO), "python", *arguments]
        env = {"PATH": str(self.bin), "PYENV_ROOT": str(self.pyenv), "HOME": os.devnull}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without any Python."""
    return Machine(tmp_path)


def test_python312_on_path_comes_first(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.13")
    machine.add(machine.pyenv / "versions/3.12.7/bin/python", "3.12")
    expected = machine.add(machine.bin / "python3.12", "3.12")
    assert machine.found().stdout.strip() == str(expected)


def test_pyenv_is_found_behind_a_dead_shim(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12", None)
    machine.add(machine.bin / "python3", "3.11")
    machine.add(machine.pyenv / "versions/3.11.7/bin/python", "3.11")
    machine.add(machine.pyenv / "versions/3.13.0/bin/python", "3.13")
    expected = machine.add(machine.pyenv / "versions/3.12.1/bin/python", "3.12")
    assert machine.found().stdout.strip() == str(expected)


def test_a_new_enough_python3_will_do(machine: Machine) -> None:
    expected = machine.add(machine.bin / "python3", "3.13")
    assert machine.found().stdout.strip() == str(expected)


def test_a_newer_pyenv_version_will_do(machine: Machine) -> None:
    machine.add(machine.bin / "python3", "3.9")
    expected = machine.add(machine.pyenv / "versions/3.13.0/bin/python", "3.13")
    assert machine.found().stdout.strip() == str(expected)


def test_it_can_be_named(machine: Machine) -> None:
    machine.add(machine.bin / "python3.12", "3.12")
    assert machine.found("PYTHON=/opt/python").stdout.strip() == "/opt/python"


@pytest.mark.parametrize("version", [None, "3.11", "2.7"])
def test_says_what_to_install(machine: Machine, version: str | None) -> None:
    machine.add(machine.bin / "python3", version)
    done = machine.found()
    assert done.returncode != 0
    assert "No Python of 3.12 or newer" in done.stderr
    assert "apt install python3.12 python3.12-venv" in done.stderr
    assert "make PYTHON=/path/to/python3.12" in done.stderr


def test_help_lists_every_target() -> None:
    done = subprocess.run(["make", "-C", str(REPO), "help"], capture_output=True, text=True, check=True)
    for target in ("setup", "smoke", "data", "test", "test-slow", "check", "clean", "help"):
        assert f"make {target} " in done.stdout
