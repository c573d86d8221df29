"""The wheel holds the three packages and every YAML file, and the commands it installs exist."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from k25_train.startup.packages import check_packages
from tests.helpers.project_sources import CODE, REPO, imports_of, relative, source_files

SETUP = (REPO / "setup.py").read_text()
SOURCES = ("setup.py", "pyproject.toml", *CODE, "conf")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from a copy of the sources, without isolation and so without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    # Neighbours that a careless search for packages would take up.
    for name in ("tests", "docker"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == set(CODE)


def test_every_module_and_yaml_is_inside(wheel: zipfile.ZipFile) -> None:
    inside = set(wheel.namelist())
    yamls = {f"k25_train/{relative(path)}" for path in (REPO / "conf").rglob("*.yaml")}
    assert len(yamls) > 5
    assert yamls <= inside
    assert {relative(path) for path in (REPO / "launch/templates").iterdir()} <= inside
    for package in CODE:
        modules = {relative(path) for path in source_files(package)}
        assert modules <= inside, "a folder lacks __init__.py?"


def test_wheel_finds_its_own_conf(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.'); from k25_train.compose.resolve import CONF_DIR, compose; "
        "compose(['experiment=smoke']); print(CONF_DIR)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(tmp_path / "k25_train" / "conf"), done.stderr


def test_console_scripts_exist(wheel: zipfile.ZipFile) -> None:
    metadata = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(metadata).decode())
    commands = dict(parser["console_scripts"])
    names = (
        "train eval checkpoint convert data dryrun metrics plan preflight rl rollout status submit".split()
    )
    assert set(commands) == {f"k25-{name}" for name in names}
    for target in commands.values():
        module, _, function = target.partition(":")
        assert function == "main"
        path = REPO / f"{module.replace('.', '/')}.py"
        assert path.is_file(), f"{module} does not exist"
        assert re.search(r"^(def main\(|main = |@hydra_app\ndef main)", path.read_text(), re.MULTILINE), (
            target
        )


NEXT_TO_THE_TRAINER = {"vllm"}
"""Imported only where `rollout.transport=nccl` says so, or by vLLM itself: what it asks for excludes what
this project asks for, so no extra of setup.py can name it; sites install it without its dependencies."""


def test_every_import_is_a_declared_dependency() -> None:
    declared = {canonical(name) for name in re.findall(r'"([A-Za-z][\w-]*)(?:\[[\w,]+\])?[=<>]', SETUP)}
    distributions = packages_distributions()
    for path in source_files(*CODE):
        imported = {name.split(".")[0] for name in imports_of(path)}
        for name in imported - sys.stdlib_module_names - {*CODE, *NEXT_TO_THE_TRAINER}:
            # Namespaces such as nvidia belong to many distributions; one of them has to be ours.
            owners = {canonical(owner) for owner in distributions.get(name, [name])}
            assert owners & declared, f"{relative(path)} imports {name}, which setup.py does not name"


def canonical(distribution: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_our_packages_carry_the_mark() -> None:
    check_packages("parallel", "launch")


def test_a_foreign_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPO)!r}]; import k25_train"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"imported 'parallel' from {tmp_path}" in done.stderr
    assert "pip uninstall parallel" in done.stderr
