"""The Apptainer definition and its wrapper for SLURM, by their grammar and by stand-ins."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from k25_train.compose.resolve import compose
from tests.helpers.image_files import DOCKER, SCRIPTS, stages, stand_in

DEFINITION = (DOCKER / "apptainer.def").read_text()
SECTIONS = {
    *("setup", "files", "post", "environment", "startscript", "runscript", "test", "labels", "help"),
    *("arguments", "pre", "appinstall", "apprun"),
}
"""Of Apptainer's definition files."""
WRAPPER = str(DOCKER / "apptainer_python.sh")


def parse(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Header and sections, by the rules of Apptainer's parser. Raises ValueError at what it would refuse."""
    head, *rest = re.split(r"^%", text, flags=re.MULTILINE)
    header = {}
    for line in head.splitlines():
        if line.strip() and not line.startswith("#"):
            key, colon, value = line.partition(":")
            if not colon or not value.strip():
                raise ValueError(f"header: {line!r}")
            header[key.strip().lower()] = value.strip()
    if not text.lstrip("#\n ").lower().startswith("bootstrap:") or "from" not in header:
        raise ValueError("a definition begins with Bootstrap and has From")
    sections = {}
    for part in rest:
        name, _, body = part.partition("\n")
        if name.strip() not in SECTIONS or name.strip() in sections:
            raise ValueError(f"section %{name}")
        sections[name.strip()] = body
    return header, sections


def test_the_definition_is_one() -> None:
    header, sections = parse(DEFINITION)
    assert header == {"bootstrap": "docker-archive", "from": "k25-train.tar"}
    # The image that was tested, and nothing that was not.
    assert set(sections) == {"environment", "runscript", "test", "help"}
    for name in ("environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections[name], text=True, check=True)


@pytest.mark.parametrize(
    "slip",
    [("Bootstrap: ", "Bootstrap "), ("%runscript", "%runscrpt"), ("%test", "%help"), ("From: ", "Form: ")],
)
def test_slips_are_found(slip: tuple[str, str]) -> None:
    with pytest.raises(ValueError):
        parse(DEFINITION.replace(*slip))


def test_its_variables_are_those_of_the_image() -> None:
    _, sections = parse(DEFINITION)
    (set_by_image,) = [step for step in stages()["image"] if step.startswith("ENV ")]
    image = dict(word.split("=", 1) for word in set_by_image.split()[1:])
    found = dict(re.findall(r"export (\w+)=(\S+)", sections["environment"]))
    assert found.keys() == image.keys()
    assert {name: found[name] for name in found if name != "PATH"} == {
        name: image[name] for name in image if name != "PATH"
    }
    assert found["PATH"].startswith("/opt/venv/bin:")


def run(folder: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The wrapper with stand-ins for Apptainer and the node's Python."""
    for name in ("apptainer", "python3"):
        stand_in(folder, name, f'echo {name} "$@"')
    given = {"PATH": f"{folder}:/usr/bin:/bin", "NVIDIA_DEVICE": "/nonexistent"} | environment
    return subprocess.run(
        [WRAPPER, *words], env=given, cwd=folder, capture_output=True, text=True, check=False
    )


def test_ranks_run_in_the_image(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "launch.node", "a b", K25_SIF="/i/k25.sif")
    inside = "/i/k25.sif /opt/k25-train/docker/entrypoint.sh python -m launch.node a b"
    assert done.stdout == f"apptainer exec --pwd {tmp_path} {inside}\n"


def test_gpus_are_passed_where_there_are_some(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "launch.node", K25_SIF="k", NVIDIA_DEVICE=os.devnull)
    assert f"--pwd {tmp_path} --nv k " in done.stdout


@pytest.mark.parametrize("module", ["launch.supervisor", "launch.rendezvous"])
def test_what_speaks_to_slurm_runs_on_the_node(module: str, tmp_path: Path) -> None:
    """SLURM's commands are not in the image."""
    assert run(tmp_path, "-m", module, "/runs/a").stdout == f"python3 -m {module} /runs/a\n"
    own = stand_in(tmp_path, "own", "echo own")
    assert run(tmp_path, "-m", module, K25_HOST_PYTHON=str(own)).stdout == "own\n"


def test_without_an_image_the_key_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "launch.node")
    assert done.returncode == 2
    assert "K25_SIF" in done.stderr


def test_the_cluster_file_of_the_readme_and_of_the_wrapper_is_legal() -> None:
    blocks = re.findall(r"^```\n(slurm:\n.*?)^```", (DOCKER / "README.md").read_text(), re.M | re.S)
    comment = re.findall(r"^#   (slurm:|environment:|  .*)$", Path(WRAPPER).read_text(), re.M)
    for text in (*blocks, "\n".join(comment)):
        keys = yaml.safe_load(text)
        assert Path(keys["slurm"]["python"]).name in {script.name for script in SCRIPTS}
        given = [
            f"cluster.environment.{name}={{value: '{each['value']}', reason: '{each['reason']}'}}"
            for name, each in keys["environment"].items()
        ]
        config = compose(
            [
                "experiment=smoke",
                "cluster=local_slurm",
                f"cluster.slurm.python={keys['slurm']['python']}",
                *given,
            ]
        )
        assert config.cluster.environment["K25_SIF"].value == "/shared/images/k25-train.sif"
    assert len(blocks) == 1
