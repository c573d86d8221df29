"""What an image installs: exact versions with hashes, and the base's builds kept."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.image_files import DOCKER, pins, script, stand_in
from tests.helpers.project_sources import REPO

PINS = pins()
LOCK = (DOCKER / "pins.lock").read_text()
LOCKED = [line for line in LOCK.splitlines() if "==" in line]
TORCH_PART, GPU_PART = "# Only if the base has no PyTorch.", "# Only if that PyTorch is for GPUs."
lock = script("lock")


@pytest.mark.parametrize("name", ["apex", "transformer-engine", "nvidia-apex", "flash-attn"])
def test_what_is_built_for_the_base_is_not_pinned(name: str) -> None:
    assert name not in PINS


def test_pins_are_exact_and_keep_the_ranges_of_setup() -> None:
    assert all(re.fullmatch(r"\d[\w.]*", pin) for pin in PINS.values())
    assert list(PINS) == [canonicalize_name(name) for name in PINS]
    setup = (REPO / "setup.py").read_text().partition("install_requires")[2].partition("extras_require")[0]
    requirements = [
        Requirement(text) for text in re.findall(r'"([\w-]+[=<>][^"]*)"', setup) if "python" not in text
    ]
    assert len(requirements) > 15
    for requirement in requirements:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_everything_of_cuda_stays_the_bases() -> None:
    of_cuda = [name for name in PINS if name in ("torch", "triton") or name.startswith(("nvidia", "cuda"))]
    _, _, last_part = LOCK.partition(f"{TORCH_PART}\n")
    assert of_cuda == [line.partition("==")[0] for line in last_part.splitlines() if "==" in line]
    assert of_cuda[1:] == re.findall(r"^([\w-]+)==", LOCK.partition(f"{GPU_PART}\n")[2], re.MULTILINE)


def test_hashes_are_those_of_the_pins() -> None:
    """A version that was changed without `make pins`, and the other way round, is found here."""
    assert pins(DOCKER / "pins.lock") == PINS, "run make pins"
    headings = [line for line in LOCK.splitlines() if line.startswith("# Only")]
    assert headings == [TORCH_PART, GPU_PART]


def test_every_pin_has_the_hash_of_each_file_it_names() -> None:
    form = re.compile(r"([\w-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)  # (\S+(?: \S+)*)")
    for line in LOCKED:
        found = form.fullmatch(line)
        assert found is not None, line
        name, version, hashes, files = found.groups()
        assert len(hashes.split()) == len(files.split()), line
        for file in files.split():
            stem, _, rest = file.partition(f"-{version}")
            assert canonicalize_name(stem) == name and rest, file


@pytest.mark.parametrize("python", lock.PYTHONS)
def test_every_pin_has_a_file_for_each_python(python: tuple[int, int]) -> None:
    tags = set(map(str, lock.tags_of(python)))
    for line in LOCKED:
        files = line.partition("  # ")[2].split()
        if all(file.endswith(".tar.gz") for file in files):
            continue
        found = [set(map(str, lock.parse_wheel_filename(file)[3])) & tags for file in files]
        assert any(found), f"{line}: no wheel for Python {python}"


def release(*names: str, sdist: bool = True) -> dict[str, Any]:
    """An entry of pylock.toml."""
    files = [{"url": f"https://example.org/{name}", "hashes": {"sha256": name}} for name in names]
    made: dict[str, Any] = {"name": "a", "version": "1", "wheels": files}
    return made | ({"sdist": {"url": "https://example.org/a-1.tar.gz"}} if sdist else {})


def test_the_file_is_the_one_that_pip_prefers() -> None:
    tags = lock.tags_of((3, 12))
    any_python, own = "a-1-py3-none-any.whl", "a-1-cp312-cp312-manylinux_2_28_x86_64.whl"
    stable = "a-1-cp310-abi3-manylinux2014_x86_64.whl"
    foreign = ("a-1-cp313-cp313-manylinux_2_28_x86_64.whl", "a-1-cp312-cp312-win_amd64.whl")
    too_new = "a-1-cp312-cp312-manylinux_2_41_x86_64.whl"

    def chosen(*names: str) -> str:
        return lock.file_name(lock.choose(release(*names), tags))

    assert chosen(any_python, own, stable, *foreign) == own
    assert chosen(any_python, stable, *foreign) == stable
    assert chosen(any_python, *foreign, too_new) == any_python
    assert chosen(*foreign, too_new) == "a-1.tar.gz"
    with pytest.raises(ValueError, match="a 1: no file for cp312"):
        lock.choose(release(*foreign, sdist=False), tags)


def test_lock_keeps_order_and_headings(tmp_path: Path) -> None:
    """uv is a stand-in that writes what it was asked for."""
    wheel = '{ url = "https://h/a-1-py3-none-any.whl", hashes = { sha256 = "00" } }'
    out = 'while [ "$1" != --output-file ]; do shift; done; cat >"$2" <<X\n'
    uv = stand_in(tmp_path, "uv", f'{out}[[packages]]\nname = "a"\nversion = "1"\nwheels = [{wheel}]\nX')
    (tmp_path / "pins.txt").write_text("# About.\n\n# First.\na==1\n\n# Last.\n")
    text = lock.lock(tmp_path / "pins.txt", str(uv))
    line = "a==1 --hash=sha256:00  # a-1-py3-none-any.whl"
    assert text == f"{lock.HEAD}\n# First.\n{line}\n\n# Last.\n"


def install(folder: Path, device: str, base_has_torch: bool) -> tuple[dict[str, str], str]:
    """Lists that install.sh gives to pip by their kind, and all it printed; python is a stand-in."""
    fake = f"""case "$1" in
    -c) [ "$2" = "${{2#*sys.exit}}" ] && {{ echo {folder}/torch; exit; }}; exit {int(not base_has_torch)} ;;
    */cuda_stubs.py) echo "stubs $2 $3" ;;
    *) list=${{!#}}; cp "$list" {folder}/$(basename "$list"); echo "$@ PIP_CONSTRAINT=[$PIP_CONSTRAINT]" ;;
    esac"""
    stand_in(folder / "bin", "python", fake)
    if not base_has_torch:
        stand_in(folder / "bin", "torchrun", "# made by pip")
    environment = os.environ | {
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PIP_CONSTRAINT": "/etc/pip/constraint.txt",
        "STUBS": "/stubs",
    }
    command = [str(DOCKER / "install.sh"), str(DOCKER / "pins.lock"), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {kind: (folder / kind).read_text() for kind in ("wheels", "sources")}, done.stdout


@pytest.mark.parametrize(
    ("device", "base_has_torch", "has_torch", "has_cuda"),
    [
        ("cpu", False, True, False),
        ("gpu", False, True, True),
        ("gpu", True, False, False),
        ("cpu", True, False, False),
    ],
)
def test_install_leaves_out_what_the_base_has(
    device: str, base_has_torch: bool, has_torch: bool, has_cuda: bool, tmp_path: Path
) -> None:
    lists, printed = install(tmp_path, device, base_has_torch)
    assert ("torch==" in lists["wheels"]) is has_torch
    assert ("nvidia-nccl" in lists["wheels"]) is has_cuda
    assert "megatron-core==" in lists["wheels"]
    assert f"stubs {tmp_path}/torch/lib /stubs" in printed or not (has_torch and not has_cuda)
    assert ("stubs" in printed) is (has_torch and not has_cuda)
    # The base's own would start the base's Python.
    torchrun = tmp_path / "bin" / "torchrun"
    assert (
        f'exec "{tmp_path}/bin/python" -m torch.distributed.run' in torchrun.read_text()
    ) is base_has_torch
    assert os.access(torchrun, os.X_OK)


def test_sources_are_built_with_what_was_installed_by_hash(tmp_path: Path) -> None:
    lists, printed = install(tmp_path, "cpu", base_has_torch=False)
    assert re.findall(r"^([\w-]+)==", lists["sources"], re.MULTILINE) == ["antlr4-python3-runtime"]
    assert ".tar.gz" not in lists["wheels"]
    wheels, sources = [line for line in printed.splitlines() if "pip install" in line]
    for line in (wheels, sources):
        assert "--require-hashes" in line and "--no-deps" in line and line.endswith("PIP_CONSTRAINT=[]")
    assert "--only-binary :all:" in wheels
    assert "--no-build-isolation" in sources


@pytest.mark.parametrize("part", [TORCH_PART, GPU_PART])
def test_install_refuses_hashes_without_a_mark(part: str, tmp_path: Path) -> None:
    path = tmp_path / "pins.lock"
    path.write_text(LOCK.replace(part, ""))
    done = subprocess.run([DOCKER / "install.sh", path, "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert part in done.stderr
