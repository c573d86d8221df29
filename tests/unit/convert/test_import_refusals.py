"""What is wrong with a folder is named before anything is written, or by the unit that meets it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k25_train.convert import __main__ as convert
from k25_train.export.quantization import int4_config
from tests.helpers.hf_folders import fp8_blocks, k25_config, random_state, small_model, write_folder

EXPERT = "language_model.model.layers.1.mlp.experts.0.down_proj.weight"
GATE = "language_model.model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of two files."""
    state = random_state(small_model())
    return write_folder(tmp_path_factory.mktemp("sound") / "hf", state, k25_config(small_model()))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the whole folder, which becomes one of a single file."""
    state: dict[str, Tensor] = {}
    for file in files_of(folder):
        state |= {name: each.clone() for name, each in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(state)
    save_file(state, folder / "model.safetensors")


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def drop_file(folder: Path) -> None:
    files_of(folder)[1].unlink()


def truncate(folder: Path) -> None:
    file = files_of(folder)[0]
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    file = files_of(folder)[0]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def name_outside(folder: Path, name: str = "../model.safetensors") -> None:
    def change(values: dict[str, Any]) -> None:
        values["weight_map"][GATE] = name

    edit_json(folder / "model.safetensors.index.json", change)


def name_absolutely(folder: Path) -> None:
    name_outside(folder, "/model.safetensors")


def overlap(folder: Path) -> None:
    """A header in which two tensors share bytes."""
    file = files_of(folder)[0]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    same = [name for name in header if header[name].get("shape") == [48]]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def misshape(state: dict[str, Tensor]) -> None:
    state[GATE] = state[GATE].T.contiguous()


def add_unknown(state: dict[str, Tensor]) -> None:
    state["language_model.model.layers.1.mlp.strange.weight"] = torch.ones(3)


def add_layer(state: dict[str, Tensor]) -> None:
    state[GATE.replace("layers.1.", "layers.7.")] = state[GATE].clone()


def lose(state: dict[str, Tensor]) -> None:
    del state[GATE]


def lose_half(state: dict[str, Tensor]) -> None:
    del state[EXPERT.replace("down", "up")]


def lose_scale(state: dict[str, Tensor]) -> None:
    state[EXPERT] = state[EXPERT].to(torch.float8_e4m3fn)


def with_scale(state: dict[str, Tensor], value: float) -> None:
    codes, scales, _ = fp8_blocks(state[EXPERT])
    state[EXPERT], state[f"{EXPERT}_scale_inv"] = codes, torch.full_like(scales, value)


def spoil_scale(state: dict[str, Tensor]) -> None:
    with_scale(state, float("nan"))


def spoil_weight(state: dict[str, Tensor]) -> None:
    state[GATE][1, 2] = float("inf")


def too_large(state: dict[str, Tensor]) -> None:
    state[GATE] = torch.full(state[GATE].shape, 3.4e38)


def pack(state: dict[str, Tensor], group: int, shape: list[int] | None = None) -> None:
    weight = state.pop(EXPERT)
    rows, columns = weight.shape
    state[f"{EXPERT}_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    state[f"{EXPERT}_scale"] = torch.ones(rows, columns // group, dtype=torch.bfloat16)
    state[f"{EXPERT}_shape"] = torch.tensor(shape or [rows, columns], dtype=torch.int32)


def other_groups(state: dict[str, Tensor]) -> None:
    pack(state, group=16)


def other_shape(state: dict[str, Tensor]) -> None:
    pack(state, group=32, shape=[64, 31])


def integers(state: dict[str, Tensor]) -> None:
    state[GATE] = state[GATE].to(torch.int8)


def twice(state: dict[str, Tensor]) -> None:
    state["lm_head.weight"] = state["language_model.lm_head.weight"].clone()


def packed_and_plain(state: dict[str, Tensor]) -> None:
    weight = state[EXPERT]
    pack(state, 32)
    state[EXPERT] = weight


OF_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing file": (drop_file, "1 of 2 files in model.safetensors.index.json are not there: model-00002"),
    "truncated file": (truncate, "model-00001-of-00002.safetensors: is no whole safetensors file: it has"),
    "damaged header": (damage_header, "its header would have 18,446,744"),
    "index names ../": (name_outside, "names the file '../model.safetensors'"),
    "index names a root": (name_absolutely, "names the file '/model.safetensors'"),
    "overlapping tensors": (overlap, " would follow"),
}
OF_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "wrong shape": (misshape, f"{GATE} has shape [64, 4] instead of [4, 64]"),
    "unknown name": (
        add_unknown,
        "1 tensors of the folder have no place in the model: language_model.model.layers.1",
    ),
    "layer that the model lacks": (
        add_layer,
        "no place in the model: language_model.model.layers.7.mlp.gate",
    ),
    "missing tensor": (lose, "not in the folder: language_model.decoder.layers.1.mlp.router.weight"),
    "half of a pair": (lose_half, "is made in part only"),
    "FP8 without scales": (lose_scale, f"its scales {EXPERT}_scale_inv are missing"),
    "scale that is NaN": (spoil_scale, f"{EXPERT}_scale_inv has a scale that is not finite"),
    "weight that is infinite": (spoil_weight, f"{GATE} holds numbers that are not finite"),
    "weight beyond bfloat16": (too_large, f"{GATE} holds numbers too large for torch.bfloat16"),
    "groups of 16": (other_groups, "groups of 32 have scales [64, 1]; other groups are not read"),
    "INT4 of another shape": (other_shape, f"{EXPERT}_shape says [64, 31]"),
    "integers": (integers, f"{GATE} is I8, but weights are read as"),
    "packed and plain": (packed_and_plain, f"{EXPERT} is there both packed and as it is"),
    "the same twice": (twice, "comes twice or in part, as language_model.lm_head.weight, lm_head.weight"),
}


@pytest.mark.parametrize("case", [*OF_FILES, *OF_TENSORS])
def test_folders_that_are_refused(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    if case in OF_FILES:
        spoil, expected = OF_FILES[case]
        spoil(folder)
    else:
        change, expected = OF_TENSORS[case]
        edit(folder, change)
    assert convert.main(["import", str(folder), str(tmp_path / "out"), "--workers", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("CheckpointError: ")
    assert expected in told
    assert not (tmp_path / "out").exists()


def int4(**weights: object) -> dict[str, Any]:
    scheme = int4_config()
    scheme["config_groups"]["group_0"]["weights"] |= weights
    return scheme


CONFIGS: dict[str, tuple[str, object, str]] = {
    "softmax router": ("scoring_func", "softmax", "scoring_func: 'softmax' instead of 'sigmoid'"),
    "groups of experts": ("n_group", 8, "n_group: 8 instead of 1"),
    "tied head": ("tie_word_embeddings", True, "tie_word_embeddings: True instead of False"),
    "layers without end": (
        "num_hidden_layers",
        10**12,
        "num_hidden_layers is 1000000000000; it must be 0 to",
    ),
    "no width": ("hidden_size", None, "hidden_size is None, no number"),
    "other rope": ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope of type 'linear'"),
    "rows in halves": ("rope_interleave", False, "rope_interleave: False instead of True"),
    "rope of its own scale": (
        "rope_scaling",
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
        "attention_factor: 1.5 instead of None",
    ),
    "rope that is no section": ("rope_parameters", [1], "must be sections"),
    "asymmetric INT4": (
        "quantization_config",
        int4(symmetric=False),
        "quantization_config.config_groups.group_0.weights.symmetric: False instead of True",
    ),
    "INT4 by other columns": (
        "quantization_config",
        int4(actorder="group"),
        "weights.actorder: 'group' instead of None",
    ),
    "FP8 of rows": (
        "quantization_config",
        {"quant_method": "fp8", "weight_block_size": [1, 128]},
        "weight_block_size: [1, 128] instead of [128, 128]",
    ),
    "unknown numbers": ("quantization_config", {"quant_method": "awq"}, "quant_method: 'awq' instead of"),
    "layers that are not there": ("num_hidden_layers", 3, "tensors of the model are not in the folder"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, value, expected = CONFIGS[case]
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    edit_json(folder / "config.json", lambda values: values["text_config"].update({key: value}))
    assert convert.main(["import", str(folder), str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err


OF_THE_WHOLE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "tied head": (
        lambda values: values.update(tie_word_embeddings=True),
        "tie_word_embeddings: True instead",
    ),
    "other merging": (lambda values: values["vision_config"].update(merge_type="mlp"), "merge_type: 'mlp'"),
    "merging that is a number": (
        lambda values: values["vision_config"].update(merge_kernel_size=2),
        "merge_kernel_size 2: the projector merges 2 x 2",
    ),
    "no number": (lambda values: values.update(eps=float("inf")), "is no JSON (it has a number Infinity)"),
}


@pytest.mark.parametrize("case", OF_THE_WHOLE)
def test_configurations_that_are_refused_as_a_whole(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = OF_THE_WHOLE[case]
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    edit_json(folder / "config.json", change)
    assert convert.main(["import", str(folder), str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err


def test_the_release_says_what_is_read(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    edit_json(folder / "config.json", lambda values: values["text_config"].update(quantization_config=int4()))
    assert convert.main(["import", str(folder), str(tmp_path / "out"), "--dry-run"]) == 0


def test_choices_of_the_user(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another model, patterns that mean nothing, too little memory, a place that is taken, no room."""
    out = tmp_path / "out"

    def told(*more: str) -> str:
        assert convert.main(["import", str(whole), str(out), *more]) == 2
        return capsys.readouterr().err

    difference = told("--model", "k25_tiny")
    assert "model.num_layers=5, but 2 in config.json" in difference
    assert "model.vision.hidden_size=96, but 48 in config.json" in difference
    assert "no tensor is meant by *.strange" in told("--leave-out", "*.strange")
    assert "GiB are needed; allow more" in told("--memory-gib", "0.05")
    assert "--node 2: must be 0 to 1" in told("--node", "2", "--num-nodes", "2")
    assert not out.exists()
    out.mkdir()
    assert "is there already, and not of this import" in told()


def test_no_room(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("k25_train.convert.importing.disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    assert convert.main(["import", str(whole), str(tmp_path / "out")]) == 2
    assert "bytes are to be written, but 1 are free there: make room" in capsys.readouterr().err


def test_a_part_alone(whole: Path, tmp_path: Path) -> None:
    """What is left out by name is not missed; what is missing may be named."""
    arguments = ["--workers", "1", "--leave-out", "language_model.*", "--leave-out", "mm_projector.*"]
    assert convert.main(["import", str(whole), str(tmp_path / "tower"), *arguments]) == 0
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    edit(folder, lose)
    arguments = ["--workers", "1", "--allow-missing", "*.router.weight"]
    assert convert.main(["import", str(folder), str(tmp_path / "rest"), *arguments]) == 0


def test_numbers_of_a_sum_are_not_enough() -> None:
    """The check of finite numbers is by extremes: NaN anywhere is seen, in every dtype."""
    from k25_train.convert.number_formats import is_finite

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (np.nan, np.inf, -np.inf):
            numbers = torch.zeros(1000, dtype=dtype)
            assert is_finite(numbers)
            numbers[-1] = value
            assert not is_finite(numbers)
