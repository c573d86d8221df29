"""The files that an image is built from, and their Python scripts as modules."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from tests.helpers.project_sources import REPO

DOCKER = REPO / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
DOCKERFILE = re.sub(
    r"\\\n(?:\s*#.*\n)*\s*", "", re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M)
)


def stages() -> dict[str, list[str]]:
    """Instructions of each stage by its name, those before the first under an empty name."""
    found: dict[str, list[str]] = {"": []}
    stage = ""
    for step in DOCKERFILE.splitlines():
        if named := re.fullmatch(r"FROM (\S+)(?: AS (\w+))?", step):
            stage = named[2] or "last"
            found[stage] = []
        if step:
            found[stage].append(step)
    return found


def pins(path: Path = DOCKER / "pins.txt") -> dict[str, str]:
    """Version by package."""
    lines = (line.partition(" ")[0] for line in path.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def script(name: str) -> ModuleType:
    """A Python script of the folder as a module; it may import its neighbours."""
    if str(DOCKER) not in sys.path:
        sys.path.append(str(DOCKER))
    spec = importlib.util.spec_from_file_location(f"image_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def stand_in(folder: Path, name: str, body: str) -> Path:
    """A command of this name that runs a few lines of shell."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path
