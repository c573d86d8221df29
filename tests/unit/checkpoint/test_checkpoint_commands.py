"""`k25-checkpoint` from outside: what it prints, what it finds, and how it ends."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from k25_train.checkpoint.__main__ import main
from k25_train.checkpoint.manifest import Kind
from tests.helpers.stored_checkpoints import EXPERTS, NORM, tiny_tensors, write_stored


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 5 and 10, the second of another layout, and an import of the first."""
    folder = tmp_path_factory.mktemp("made")
    tensors = tiny_tensors()
    write_stored(folder / "run/checkpoints/step_5", tensors)
    changed = tensors | {EXPERTS.format(2): tensors[EXPERTS.format(2)] * 1.5}
    write_stored(folder / "run/checkpoints/step_10", changed, num_ranks=3, step=10, settings=["optim.lr=0.5"])
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    write_stored(folder / "imported", weights, num_ranks=1, step=0, kind=Kind.WEIGHTS)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, to break."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == status, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main([*map(str, arguments)]) == status, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_run_means_its_newest_checkpoint(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (made / "run", made / "run/checkpoints"):
        assert "its newest checkpoint is step_10" in printed(capsys, "inspect", place)
        assert as_json(capsys, "inspect", place)["step"] == 10
    (made / "run/checkpoints/latest").write_text("step_5\n")
    assert as_json(capsys, "inspect", made / "run")["step"] == 5
    (made / "run/checkpoints/latest").unlink()


def test_inspect_sums_up(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "inspect", made / "run/checkpoints/step_10", "--norms")
    layout = {"pp": 1, "vpp": 1, "ep": 1, "dp": 2, "world_size": 3}
    assert (found["kind"], found["sound"], found["layout"]) == ("run", True, layout)
    assert found["parts"]["routed experts"]["weights"] == {
        "num_tensors": 2,
        "num_elements": 384,
        "num_bytes": 768,
    }
    assert set(found["parts"]["projector"]) == {"weights", "masters", "1st moments", "2nd moments"}
    [experts] = [each for each in found["tensors"] if each["name"] == EXPERTS.format(2)]
    exact = 1.5 * tiny_tensors()[EXPERTS.format(2)]
    assert experts["shape"] == [4, 6, 8] and experts["dtype"] == "bfloat16"
    assert experts["l2"] == pytest.approx(float(exact.double().norm()), rel=1e-12)
    assert experts["max_abs"] == float(exact.abs().max()) and experts["num_not_finite"] == 0


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_and_align(
    made: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    step = made / "run/checkpoints/step_5"
    for arguments in (["inspect", step], ["inspect", step, "--norms"], ["diff", step, made / "run"]):
        text = printed(capsys, *arguments, status=int(arguments[0] == "diff"))
        # Paths are as long as they are.
        lines = [line for line in text.splitlines() if str(made) not in line]
        assert max(map(len, lines)) <= width
    text = printed(capsys, "inspect", step)
    assert re.search(r"layers\.\{1-2\}\.mlp\.experts\.gate_up_proj +4 × 6 × 8", text)


def test_tensors_are_chosen_by_pattern(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "inspect", made / "run", "--tensors", "layers.?.mlp", "--tensors", "proj.0.bias")
    names = [each["name"] for each in found["tensors"]]
    assert len(names) == 4 * (2 + 1) and EXPERTS.format(1) in names
    assert main(["inspect", str(made / "run"), "--tensors", "nothing"]) == 2
    assert "--tensors nothing: fits none of the 32 tensors" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = tmp_path / "released"
    released.mkdir()
    (released / "model.safetensors.index.json").write_text("{}")
    for place, words in (
        (tmp_path / "none", "no such checkpoint"),
        (tmp_path, "is not a checkpoint: it has no manifest.json"),
        (made / "run/checkpoints/step_5/config.yaml", "is a file, not the folder"),
        (released, "k25-convert import"),
        ("foo://bar", "foo://bar: cannot be opened"),
    ):
        for command in (["inspect"], ["verify"], ["diff", made / "run"]):
            assert main([*map(str, command), str(place)]) == 2
            assert words in capsys.readouterr().err


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def data_offset(path: Path, entry: str) -> int:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = next(v for name, v in json.loads(data[8 : 8 + length]).items() if name.startswith(entry))
    return 8 + length + int(found["data_offsets"][0])


FAULTS = {
    "a flipped byte of a tensor": EXPERTS.format(1),
    "a flipped byte of a header": "rank_00001_0.safetensors: its header",
    "a flipped checksum": "rank_00001_0.safetensors: its checksums",
    "a flipped byte of padding": "rank_00001_0.safetensors: bytes between its parts",
    "a file cut short": "rank_00001_0.safetensors: has",
    "a file less": "rank_00001_0.safetensors: is missing",
    "a changed configuration": "config.yaml",
    "a changed manifest": "manifest.json",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_what_is_broken(fault: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints/step_10"
    path = folder / "rank_00001_0.safetensors"
    match fault.split(" ")[-1]:
        case "tensor":
            flip(path, data_offset(path, EXPERTS.format(1)) + 3)
        case "header":
            flip(path, 40)
        case "checksum":
            flip(path, -3)  # of the last entry
        case "padding":
            flip(path, data_offset(path, "padding."))
        case "short":
            path.write_bytes(path.read_bytes()[:-10])
        case "less":
            path.unlink()
        case "configuration":
            (folder / "config.yaml").write_text("train: {steps: 9}\n")
        case _:
            flip(folder / "manifest.json", 100)
    text = printed(capsys, "verify", folder, run / "checkpoints/step_5", status=1)
    assert FAULTS[fault] in text
    assert f"resume from {run / 'checkpoints/step_5'}, which is whole" in text
    found = as_json(capsys, "verify", folder, status=1)
    assert found["num_faults"] == len(found["checkpoints"][0]["faults"]) >= 1


def test_verify_reads_all_and_finds_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "verify", made / "run", made / "imported", "--threads", 2)
    assert found["num_faults"] == 0
    [newest, imported] = found["checkpoints"]
    assert newest["num_tensors"] == 32 and imported["num_tensors"] == 8
    everything = sum(tensor.nbytes for tensor in tiny_tensors().values())
    config = (made / "run/checkpoints/step_10/config.yaml").stat().st_size
    assert newest["num_bytes_read"] == everything + config
    assert as_json(capsys, "verify", made / "run", "--sizes")["checkpoints"][0]["num_bytes_read"] == config


def test_verify_finds_values_that_are_not_finite_and_holes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny_tensors()
    tensors[NORM.format(1)][3] = torch.nan
    write_stored(tmp_path / "step_5", tensors)
    [found] = as_json(capsys, "verify", tmp_path / "step_5", status=1)["checkpoints"]
    assert found["faults"] == [f"{NORM.format(1)}: 1 of 8 elements are not finite"]
    # A rank wrote its file, and no manifest knows it.
    write_stored(tmp_path / "step_6", tiny_tensors(), num_ranks=2, only_rank=1, step=6)
    [found] = as_json(capsys, "verify", tmp_path / "step_6", status=1)["checkpoints"]
    [fault] = found["faults"]
    assert "elements 0 to " in fault and "are missing" in fault


def test_diff_finds_what_differs(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = made / "run/checkpoints/step_5", made / "run/checkpoints/step_10"
    found = as_json(capsys, "diff", one, other, status=1)
    assert (found["num_compared"], found["num_different"]) == (32, 1)
    first = found["tensors"][0]
    assert first["name"] == EXPERTS.format(2) and first["num_unequal"] == 192
    assert first["relative"] == pytest.approx(0.5, rel=0.02) and first["cosine"] == pytest.approx(1, abs=1e-4)
    assert {"name": "optim.lr", "first": 0.01, "second": 0.5} in found["config"]
    assert {"name": "layout.world_size", "first": 2, "second": 3} in found["facts"]
    assert "31 of 32 tensors are equal" in printed(capsys, "diff", one, other, status=1)
    assert as_json(capsys, "diff", one, other, "--tolerance", 0.6)["num_different"] == 0
    assert as_json(capsys, "diff", one, one)["num_different"] == 0


def test_diff_of_a_run_and_an_import_compares_weights(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "diff", made / "imported", made / "run/checkpoints/step_5")
    assert (found["num_compared"], found["num_different"]) == (8, 0)
    assert "their weights are compared" in printed(capsys, "diff", made / "imported", made / "run", status=1)


def test_diff_tells_shapes_dtypes_and_what_is_missing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny_tensors()
    del tensors["mm_projector.proj.0.bias"]
    tensors["vision_tower.patch_embed.proj.weight"] = torch.zeros(8, 6).bfloat16()
    tensors[NORM.format(0)] = tensors[NORM.format(0)].float()
    write_stored(tmp_path / "step_5", tensors)
    found = as_json(capsys, "diff", made / "run/checkpoints/step_5", tmp_path / "step_5", status=1)
    assert {each["name"]: each["what"] for each in found["tensors"] if each["what"] != "equal"} == {
        "mm_projector.proj.0.bias": "only in the first",
        "vision_tower.patch_embed.proj.weight": "shapes [8, 12] and [8, 6]",
        NORM.format(0): "equal, bfloat16 and float32",
    }
    assert found["num_different"] == 3
