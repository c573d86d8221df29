"""Rules of the image: exact versions, the base's builds kept, no network and no root at run time."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.project_sources import REPO

DOCKER = REPO / "docker"
DOCKERFILE = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text())
STEPS = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
PINS = dict(
    line.split("==") for line in (DOCKER / "pins.txt").read_text().splitlines() if line and line[0] != "#"
)
LAST_PART = (DOCKER / "pins.txt").read_text().partition("# Only if the base has no PyTorch.\n")[2]
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def steps(instruction: str) -> list[str]:
    """Arguments of every use of a Dockerfile instruction."""
    return [step.partition(" ")[2] for step in STEPS if step.startswith(f"{instruction} ")]


def test_base_is_an_argument_without_default() -> None:
    assert STEPS[:2] == ["ARG BASE", "FROM ${BASE}"]
    assert len(steps("FROM")) == 1


def test_nothing_runs_as_root() -> None:
    assert steps("USER") == ["k25"]
    after = STEPS[STEPS.index("USER k25") :]
    assert not [step for step in after if "apt-get" in step or "pip" in step]


def test_nothing_is_fetched_at_run_time() -> None:
    """pip is cut off after the last installation, and the smoke set is in the image."""
    cut_off = STEPS.index("ENV PIP_NO_INDEX=1")
    assert not any("pip install" in step or "install.sh" in step for step in STEPS[cut_off:])
    assert any("k25_train.data build" in step for step in STEPS[:cut_off])
    assert "pip install" not in (DOCKER / "smoke.sh").read_text()


def test_the_build_ends_with_the_self_test() -> None:
    assert STEPS[-2:] == ["RUN docker/smoke.sh packages", 'CMD ["docker/smoke.sh"]']


def test_packages_come_from_the_pins_alone() -> None:
    """pip resolves nothing, so it can neither add a package nor replace the base's PyTorch."""
    installs = re.findall(r"pip install .*", DOCKERFILE + (DOCKER / "install.sh").read_text())
    assert len(installs) == 2
    assert all("--no-deps" in install for install in installs)


@pytest.mark.parametrize("name", ["apex", "transformer-engine", "nvidia-apex", "flash-attn"])
def test_what_is_built_for_the_base_is_not_pinned(name: str) -> None:
    assert name not in PINS


def test_pins_are_exact_and_keep_the_ranges_of_setup() -> None:
    assert all(re.fullmatch(r"\d[\w.]*", pin) for pin in PINS.values())
    assert list(PINS) == [canonicalize_name(name) for name in PINS]
    setup = (REPO / "setup.py").read_text().partition("extras_require")[0]
    requirements = [
        Requirement(text) for text in re.findall(r'"([\w-]+[=<>][^"]*)"', setup) if "python" not in text
    ]
    assert len(requirements) > 15
    for requirement in requirements:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_everything_of_cuda_stays_the_bases() -> None:
    of_cuda = [name for name in PINS if name in ("torch", "triton") or name.startswith(("nvidia", "cuda"))]
    assert of_cuda == [line.partition("==")[0] for line in LAST_PART.splitlines()]


@pytest.mark.parametrize("base_has_torch", [True, False])
def test_install_leaves_out_what_the_base_has(base_has_torch: bool, tmp_path: Path) -> None:
    """A stand-in for python says whether torch is there, and keeps the list that pip is given."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not base_has_torch)}\n'
        f'cp "$6" {tmp_path}/list; echo "$PIP_CONSTRAINT"\n'
    )
    stand_in.chmod(0o755)
    (tmp_path / "bin").mkdir()
    torchrun = tmp_path / "bin" / "torchrun"
    if not base_has_torch:
        torchrun.write_text("made by pip")
    environment = os.environ | {
        "VIRTUAL_ENV": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": "/etc/pip/constraint.txt",
    }
    done = subprocess.run(
        [DOCKER / "install.sh", DOCKER / "pins.txt"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = (tmp_path / "list").read_text()
    assert ("torch==" in wanted) is not base_has_torch
    assert ("nvidia-nccl" in wanted) is not base_has_torch
    assert "megatron-core==" in wanted
    assert "constraint.txt" not in done.stdout
    # The base's own would start the base's Python.
    assert (
        f'exec "{tmp_path}/bin/python" -m torch.distributed.run' in torchrun.read_text()
    ) is base_has_torch
    assert os.access(torchrun, os.X_OK) is base_has_torch


def test_install_refuses_pins_without_the_mark(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("torch==2.13.0\n")
    done = subprocess.run([DOCKER / "install.sh", pins], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Only if the base has no PyTorch" in done.stderr


def test_the_build_sees_what_it_needs_and_nothing_else() -> None:
    kept = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert "*" in (REPO / ".dockerignore").read_text().splitlines()
    assert {"conf", "docker", "k25_train", "launch", "parallel", "setup.py"} <= kept
    for name in kept:
        assert (REPO / name).exists()


def test_compose_runs_two_nodes_that_reach_nothing_else() -> None:
    services = COMPOSE["services"]
    assert {service["environment"]["PET_NODE_RANK"] for service in services.values()} == {"0", "1"}
    for name, service in services.items():
        assert service["hostname"] == name
        assert service["networks"] == ["ranks"]
        assert "ports" not in service
        assert f"--nnodes={len(services)}" in service["command"]
        assert f"cluster.nodes={len(services)}" in service["command"]
    assert COMPOSE["networks"]["ranks"]["internal"] is True
    (command,) = {tuple(service["command"]) for service in services.values()}
    assert f"--master-addr={next(iter(services))}" in command


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_stop_at_errors_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)
