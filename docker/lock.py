"""Makes pins.lock from pins.txt: the hash of every file that an image may install.

    python docker/lock.py [UV]      UV is the command of uv, from the development environment by default

uv asks the package index which files a release has; of these, the one is kept that pip prefers for each
Python in PYTHONS on the platform of the images, or the source distribution where no wheel fits. The result
has one line per pin, in the order and with the headings of pins.txt, so that install.sh can leave out parts
of it.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

DOCKER = Path(__file__).parent
PYTHONS = ((3, 12), (3, 13))
"""Of Ubuntu 24.04 and the NGC images, and of Debian 13."""
PLATFORM = "x86_64"
GLIBC = 39
"""Minor version of the oldest glibc 2 among the bases: Ubuntu 24.04's."""
HEAD = "# Made by docker/lock.py (`make pins`) from pins.txt; do not edit.\n"


def tags_of(python: tuple[int, int]) -> list[Tag]:
    """Tags of the wheels that pip installs on a base with this Python, the preferred one first."""
    platforms = [f"manylinux_2_{minor}_{PLATFORM}" for minor in range(GLIBC, 16, -1)]
    platforms += [f"manylinux2014_{PLATFORM}", f"manylinux2010_{PLATFORM}", f"manylinux1_{PLATFORM}"]
    platforms += [f"linux_{PLATFORM}"]
    interpreter = f"cp{python[0]}{python[1]}"
    return [*cpython_tags(python, platforms=platforms), *compatible_tags(python, interpreter, platforms)]


def releases(pins: Path, python: tuple[int, int], uv: str) -> dict[str, dict[str, Any]]:
    """Entries of pylock.toml (PEP 751) by package. Raises CalledProcessError if uv fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pylock.toml"
        subprocess.run(
            [
                *(uv, "pip", "compile", str(pins), "--no-deps", "--no-header", "--quiet"),
                *("--python-version", ".".join(map(str, python))),
                *("--python-platform", f"{PLATFORM}-unknown-linux-gnu"),
                *("--format", "pylock.toml", "--output-file", str(out)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found: list[dict[str, Any]] = tomllib.loads(out.read_text())["packages"]
        return {entry["name"]: entry for entry in found}


def file_name(file: dict[str, Any]) -> str:
    """Name of a file of a release."""
    return str(file.get("name") or file["url"].rpartition("/")[2])


def choose(entry: dict[str, Any], tags: list[Tag]) -> dict[str, Any]:
    """The file that pip prefers. Raises ValueError if the release has none for these tags."""
    rank = {tag: place for place, tag in enumerate(tags)}
    fitting = [
        (min(rank[tag] for tag in wheel_tags if tag in rank), file)
        for file in entry.get("wheels", [])
        if (wheel_tags := parse_wheel_filename(file_name(file))[3]) & rank.keys()
    ]
    if fitting:
        return min(fitting, key=lambda pair: pair[0])[1]
    if "sdist" not in entry:
        raise ValueError(f"{entry['name']} {entry['version']}: no file for {tags[0]}: choose another version")
    found: dict[str, Any] = entry["sdist"]
    return found


def line_of(name: str, version: str, files: Iterable[dict[str, Any]]) -> str:
    """A line of pins.lock: the pin, the hashes, and which files they are of."""
    hashes = {file_name(file): file["hashes"]["sha256"] for file in files}
    options = " ".join(f"--hash=sha256:{digest}" for digest in hashes.values())
    return f"{name}=={version} {options}  # {' '.join(hashes)}"


def lock(pins: Path, uv: str) -> str:
    """Text of pins.lock."""
    found = {python: releases(pins, python, uv) for python in PYTHONS}
    lines = []
    for line in pins.read_text().partition("\n\n")[2].splitlines():
        if not re.match(r"\w", line):
            lines.append(line)
            continue
        name, _, version = line.partition("==")
        files = [choose(found[python][name], tags_of(python)) for python in PYTHONS]
        lines.append(line_of(name, version, files))
    return HEAD + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else str(Path(sys.executable).with_name("uv"))
    (DOCKER / "pins.lock").write_text(lock(DOCKER / "pins.txt", command))
