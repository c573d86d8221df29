"""Rules of the image: what it is built on, that it can be told apart, no network and no root at run time."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.image_files import DOCKER, DOCKERFILE, SCRIPTS, stages
from tests.helpers.project_sources import REPO
from tests.helpers.shellcheck import complaints

STAGES = stages()
BUILD, IMAGE = STAGES["build"], STAGES["image"]
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def steps(stage: list[str], instruction: str) -> list[str]:
    """Arguments of every use of an instruction."""
    return [step.partition(" ")[2] for step in stage if step.startswith(f"{instruction} ")]


def test_base_is_an_argument_without_default() -> None:
    assert STAGES[""] == ["ARG BASE"]
    assert steps(BUILD, "FROM") == ["${BASE} AS build"]
    assert steps(IMAGE, "FROM") == ["${BASE} AS image"]


@pytest.mark.parametrize(
    ("base", "allow_tag", "is_good"),
    [
        (f"debian@sha256:{'a' * 64}", "no", True),
        ("debian:trixie-slim", "no", False),
        ("debian", "no", False),
        ("debian:trixie-slim", "yes", True),
        ("debian:trixie-slim", "", False),
    ],
)
def test_the_build_itself_refuses_a_base_without_digest(base: str, allow_tag: str, is_good: bool) -> None:
    """Also without docker/build.sh."""
    check = steps(BUILD, "RUN")[0]
    environment = os.environ | {"BASE": base, "ALLOW_TAG": allow_tag}
    done = subprocess.run(["sh", "-c", check], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is is_good
    if not is_good:
        assert f"BASE={base}: must be NAME@sha256:DIGEST" in done.stderr


def test_labels_say_what_it_is_and_where_it_comes_from() -> None:
    (labels,) = steps(IMAGE, "LABEL")
    found = dict(word.split("=", 1) for word in shlex.split(labels))
    prefix = "org.opencontainers.image."
    assert all(name.startswith(prefix) for name in found)
    assert {name.removeprefix(prefix) for name in found} == {
        *("title", "description", "version", "revision", "created", "base.name", "base.digest"),
    }
    arguments = {step.partition("=")[0] for step in steps(IMAGE, "ARG")}
    for value in found.values():
        for name in re.findall(r"\$\{(\w+)\}", value):
            assert name in arguments, "an argument that this stage does not declare is empty"


def test_what_every_commit_changes_comes_after_what_takes_long() -> None:
    """Otherwise each commit would download gigabytes again."""
    long = next(index for index, step in enumerate(BUILD) if "install.sh" in step and step.startswith("RUN"))
    for name in ("REVISION", "VERSION", "SOURCE_DATE_EPOCH", "CREATED"):
        assert f"ARG {name}" not in BUILD[:long]
    assert BUILD.index("COPY . /opt/k25-train") > long


def test_nothing_runs_as_root() -> None:
    """By number, since Kubernetes cannot tell from a name that it is not root's."""
    assert steps(IMAGE, "USER") == ["1000:1000"]
    after = IMAGE[IMAGE.index("USER 1000:1000") :]
    assert not [step for step in after if "apt" in step or "pip" in step]


def test_nothing_is_fetched_at_run_time() -> None:
    """pip is cut off, and the smoke set is in the image."""
    assert any("PIP_NO_INDEX=1" in step for step in steps(IMAGE, "ENV"))
    assert not any("pip install" in step or "install.sh" in step for step in IMAGE)
    assert any("k25_train.data build" in step for step in BUILD)
    assert "pip install" not in (DOCKER / "smoke.sh").read_text()


def test_no_secret_of_the_building_machine_stays() -> None:
    for step in steps(BUILD, "RUN"):
        if "ca-bundle" in step:
            assert "--mount=type=secret,id=ca-bundle" in step
    assert "ca-bundle" not in "".join(IMAGE)


def test_the_build_ends_with_the_self_test_and_the_image_is_the_default() -> None:
    assert IMAGE[-3:] == [
        "RUN docker/smoke.sh packages",
        'ENTRYPOINT ["tini", "-s", "--", "/opt/k25-train/docker/entrypoint.sh"]',
        'CMD ["self-test"]',
    ]
    assert list(STAGES)[-1] == "last" and STAGES["last"] == ["FROM image"]


def test_runs_have_a_folder_for_any_user() -> None:
    assert any("install --directory --mode 1777 /runs" in step for step in steps(IMAGE, "RUN"))
    assert any("ln -s /runs runs" in step for step in steps(BUILD, "RUN"))
    assert steps(IMAGE, "WORKDIR") == ["/opt/k25-train"]


def test_packages_come_from_the_hashes_alone() -> None:
    """pip resolves nothing, so it can neither add a package nor replace the base's PyTorch."""
    installs = re.findall(r"pip install .*", DOCKERFILE + (DOCKER / "install.sh").read_text())
    assert len(installs) == 2
    assert all("--no-deps" in install for install in installs)
    assert sum("--require-hashes" in install for install in installs) == 1
    assert "--no-build-isolation --editable ." in DOCKERFILE


def test_what_preflight_reads_with_is_there() -> None:
    (apt,) = [step for step in steps(IMAGE, "RUN") if "docker/apt.sh" in step]
    for command in "ethtool lspci ping numactl ib_write_bw ibv_devinfo lldpcli chronyc mlnx_qos".split():
        assert f" {command}=" in apt


def test_agents_and_their_event_loops_have_what_they_need() -> None:
    (apt,) = [step for step in steps(IMAGE, "RUN") if "docker/apt.sh" in step]
    assert " bwrap=" in apt
    pins = (DOCKER / "pins.txt").read_text()
    assert all(f"\n{name}==" in pins for name in ("ray", "pyzmq", "uvloop", "ipykernel", "mcp", "gymnasium"))


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
        assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
        assert f"--nnodes={len(services)}" in service["command"]
        assert f"cluster.nodes={len(services)}" in service["command"]
    assert COMPOSE["networks"]["ranks"]["internal"] is True
    (command,) = {tuple(service["command"]) for service in services.values()}
    assert f"--master-addr={next(iter(services))}" in command


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_errors_and_can_be_run(script: Path) -> None:
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


def test_scripts_are_sound() -> None:
    assert len(SCRIPTS) > 5
    assert complaints(SCRIPTS) == ""
