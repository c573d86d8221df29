"""An import goes on after a kill, on any number of nodes; what is done stays, and is checked."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.convert import __main__ as convert
from k25_train.convert.importing import Import
from k25_train.errors import CheckpointError
from tests.helpers.hf_folders import k25_config, ours_of, random_state, small_model, write_folder
from tests.helpers.imports import Silent, options_of
from tests.helpers.project_sources import REPO


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder."""
    state = random_state(small_model())
    return write_folder(tmp_path_factory.mktemp("source") / "hf", state, k25_config(small_model()))


def planned(source: Path, out: Path, **changed: Any) -> Import:
    """An import in small units."""
    return Import(options_of(source, out, **{"unit_bytes": 16384} | changed))


def assert_whole(out: Path) -> None:
    """All tensors are there, and nothing of the work."""
    stored = StoredCheckpoint.open(out)
    for name, tensor in ours_of(random_state(small_model())).items():
        assert torch.equal(stored.read(name).to(tensor.dtype), tensor.flatten()), name
    assert not list(out.glob("done")) + list(out.glob("*.json.*")) + list(out.glob("import.json"))
    assert not out.with_name(out.name + ".partial").exists()


def test_nodes_share_the_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nodes = [planned(source, out, node=number, num_nodes=3) for number in range(3)]
    assert len(nodes[0].units) > 20
    assert nodes[2].run(Silent(), restart=False) == "waits for other nodes"
    assert nodes[0].run(Silent(), restart=False) == "waits for other nodes"
    files = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    times = {file.name: file.stat().st_mtime_ns for file in files}
    # A node is lost: the others' units stay as they are.
    assert planned(source, out).run(Silent(), restart=False) == "complete"
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert_whole(out)
    assert nodes[1].exists()
    assert convert.main(["import", str(source), str(out)]) == 2, "units of another size are another import"


def test_a_model_that_was_trained_further_is_another(source: Path, tmp_path: Path) -> None:
    """Of the same shapes, with the same bytes at either end of each file."""
    out = tmp_path / "out"
    planned(source, out, num_nodes=2).run(Silent(), restart=False)
    other = tmp_path / "other" / source.name
    shutil.copytree(source, other)
    file = max(other.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    assert len(data) > 220_000
    first = len(data) // 2
    data[first : first + 16384 : 2] = bytes(each ^ 1 for each in data[first : first + 16384 : 2])
    file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"belongs to another import:\n  import.fingerprint: .*\n  weights: "
    ):
        planned(other, out).run(Silent(), restart=False)


def test_two_nodes_that_finish_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see all units done; the one that renames second finds the first one's result."""
    first, second = (planned(source, tmp_path / "out", node=number, num_nodes=2) for number in (0, 1))
    first.run(Silent(), restart=False)
    commit = second._state.commit

    def late(*arguments: Any) -> bool:
        assert first.run(Silent(), restart=False) == "complete"
        return commit(*arguments)

    monkeypatch.setattr(second._state, "commit", late)
    assert second.run(Silent(), restart=False) == "complete"
    assert_whole(tmp_path / "out")


def test_damaged_units_are_written_again(source: Path, tmp_path: Path) -> None:
    node = planned(source, tmp_path / "out", node=0, num_nodes=2)
    node.run(Silent(), restart=False)
    files = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-8])
    data = bytearray(files[1].read_bytes())
    data[20] ^= 1
    files[1].write_bytes(data)
    files[2].unlink()
    (tmp_path / "out.partial" / f"{files[3].name}.{os.uname().nodename}.999999").touch()
    assert planned(source, tmp_path / "out").run(Silent(), restart=False) == "complete"
    assert_whole(tmp_path / "out")


def test_another_import_does_not_go_on(source: Path, tmp_path: Path) -> None:
    planned(source, tmp_path / "out", num_nodes=2).run(Silent(), restart=False)
    other = write_folder(
        tmp_path / "other",
        {n: -each for n, each in random_state(small_model()).items()},
        k25_config(small_model()),
    )
    for changed in ({"dtype": torch.float32}, {"source": other}):
        with pytest.raises(CheckpointError, match=r"belongs to another import"):
            planned(**{"source": source, "out": tmp_path / "out"} | changed).run(Silent(), restart=False)
    assert planned(source, tmp_path / "out", dtype=torch.float32).run(Silent(), restart=True) == "complete"
    assert (
        StoredCheckpoint.open(tmp_path / "out").tensors["mm_projector.pre_norm.bias"].dtype is torch.float32
    )


_SLOWLY = """
import sys, time
from k25_train.convert import importing, unit_writer
importing.UNIT_BYTES = 16384
importing.Options.__dataclass_fields__["unit_bytes"].default = 16384
importing.Options.__init__.__kwdefaults__["unit_bytes"] = 16384
made = unit_writer.made
def slowly(*arguments):
    time.sleep(0.01)
    return made(*arguments)
unit_writer.made = slowly
from k25_train.convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_kill_loses_the_units_at_work_alone(num_workers: int, source: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", _SLOWLY, "import", str(source), str(out), "--workers", str(num_workers)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("done/*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.stem: path.stat().st_mtime_ns for path in partial.glob("done/*.json")}
    assert 3 <= len(done) < len(planned(source, out).units)
    assert not out.exists()
    written = {f"rank_{number}_0.safetensors" for number in done}
    times = {name: (partial / name).stat().st_mtime_ns for name in written}
    assert planned(source, out).run(Silent(), restart=False) == "complete"
    assert {name: (out / name).stat().st_mtime_ns for name in written} == times
    assert_whole(out)
