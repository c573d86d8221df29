"""Exported folders: what is in them, from any layout, resumed, shared out, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from k25_train.config.model import Quantization
from k25_train.convert.__main__ import main
from k25_train.int4 import Int4Weight, dequantize, fake_quantize, quantize
from tests.helpers.hf_reference import plain_rope, tiny_model_config
from tests.helpers.released_checkpoints import released_state, stacked, write_weights
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text

MODEL = tiny_model_config(vocab_size=VOCAB_SIZE)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return released_state(MODEL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from k25_train.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    """One file."""
    return write_weights(tmp_path_factory.mktemp("whole") / "step_0", MODEL, stacked(state))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tokenizer: Path) -> dict[str, Path]:
    """Number format -> an export of the checkpoint."""
    folders = {dtype: checkpoint.parent / dtype for dtype in ("bf16", "int4")}
    for dtype, folder in folders.items():
        export(checkpoint, folder, "--dtype", dtype, "--tokenizer", tokenizer)
    return folders


def export(*words: object) -> None:
    """Run the command in this process."""
    assert main(["export", *map(str, words), "--workers", "1"]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that fails says."""
    assert main(["export", *map(str, words), "--workers", "1"]) == 2
    return " ".join(capsys.readouterr().err.split())


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors, where the index says they are."""
    index = json.loads((folder / INDEX).read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    found = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert len(found) == sum(map(len, files.values()))
    assert sum(tensor.nbytes for tensor in found.values()) == index["metadata"]["total_size"]
    return found


def test_bf16_has_the_tensors_bit_for_bit(exported: dict[str, Path], state: dict[str, Tensor]) -> None:
    found = tensors_in(exported["bf16"])
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    names = {path.name for path in exported["bf16"].iterdir()}
    # Layers, text, projector, tower.
    assert {f"model-{i:05d}-of-000006.safetensors" for i in range(1, 7)} < names
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} < names
    assert not [name for name in names if name.startswith(".")]


def test_float32_rounds_nothing(checkpoint: Path, tokenizer: Path, state: dict[str, Tensor]) -> None:
    folder = checkpoint.parent / "float32"
    export(checkpoint, folder, "--dtype", "float32", "--tokenizer", tokenizer)
    found = tensors_in(folder)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor.float()), name
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"


def test_files_are_as_the_safetensors_library_writes_them(exported: dict[str, Path]) -> None:
    for folder in exported.values():
        for path in folder.glob("*.safetensors"):
            assert path.read_bytes() == save(load_file(path)), path


def test_int4_packs_routed_experts_alone(exported: dict[str, Path], state: dict[str, Tensor]) -> None:
    found = tensors_in(exported["int4"])
    for name, tensor in state.items():
        if ".mlp.experts." not in name:
            assert torch.equal(found.pop(name), tensor), name
            continue
        expected = quantize(tensor)
        assert torch.equal(found.pop(f"{name}_packed"), expected.packed)
        assert torch.equal(found.pop(f"{name}_scale"), expected.scale)
        assert found.pop(f"{name}_shape").tolist() == list(tensor.shape)
    assert not found
    config = json.loads((exported["int4"] / "config.json").read_text())
    assert config["text_config"]["quantization_config"]["format"] == "pack-quantized"


def test_every_layout_gives_the_same_folder(
    exported: dict[str, Path], state: dict[str, Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    """Boundaries of stored parts within experts and matrices; three shares, one after another."""
    cut = write_weights(tmp_path / "step_0", MODEL, stacked(state), cuts=(0.3, 0.11, 0.59))
    out = tmp_path / "out"
    for node in (1, 2, 0):
        assert not out.exists()
        words = ("--tokenizer", tokenizer, "--node", node, "--num-nodes", 3)
        export(cut, out, "--dtype", "int4", *words)
    assert bytes_in(out) == bytes_in(exported["int4"])


def test_int4_to_ours_and_back_has_the_same_bytes(
    exported: dict[str, Path], tokenizer: Path, tmp_path: Path
) -> None:
    """Dequantised, as an import does it, cut and exported again: file by file, without the original."""
    found = tensors_in(exported["int4"])
    names = [name.removesuffix("_packed") for name in found if name.endswith("_packed")]
    state: dict[str, Tensor] = {name: t for name, t in found.items() if ".mlp.experts." not in name}
    for name in names:
        state[name] = dequantize(Int4Weight(found[f"{name}_packed"], found[f"{name}_scale"]))
    again = write_weights(tmp_path / "step_0", MODEL, stacked(state), cuts=(0.5, 0.5))
    export(again, tmp_path / "out", "--dtype", "int4", "--tokenizer", tokenizer)
    assert bytes_in(tmp_path / "out") == bytes_in(exported["int4"])


def test_like_rotates_as_the_checkpoint_does(
    exported: dict[str, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json of another stage: its rotation is replaced, in either spelling, and the rest stays."""
    own = json.loads((exported["int4"] / "config.json").read_text())
    own["text_config"] |= {"quantization_config": None}
    yarn = own["text_config"].pop("rope_scaling")
    theta = own["text_config"].pop("rope_theta")
    newer = {"rope_type": "yarn", "rope_theta": theta} | {key: yarn[key] for key in yarn if key != "type"}
    stages = {
        "longer": {"rope_scaling": yarn | {"factor": 2 * yarn["factor"]}, "rope_theta": theta},
        "earlier": {"rope_scaling": None, "rope_theta": theta},
        "in new words": {"rope_parameters": newer | {"beta_fast": 1.0}},
        "the same": {"rope_parameters": newer},
    }
    for stage, keys in stages.items():
        like = tmp_path / stage / "like"
        like.mkdir(parents=True)
        config = own | {"note": "not ours", "text_config": own["text_config"] | keys}
        (like / "config.json").write_text(json.dumps(config))
        export(checkpoint, tmp_path / stage / "out", "--like", like)
        text = json.loads((tmp_path / stage / "out/config.json").read_text())["text_config"]
        is_other = stage != "the same"
        assert ("but the rotary embedding" in " ".join(capsys.readouterr().out.split())) == is_other
        if is_other:
            assert (text["rope_scaling"], text["rope_theta"]) == (yarn, theta)
            assert "rope_parameters" not in text
        else:
            assert text["rope_parameters"] == newer


def test_nodes_that_begin_at_once(
    exported: dict[str, Path],
    checkpoint: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sees the folder before the other's order has its name; one's order is not overwritten."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / f"..export.json.{socket.gethostname()}.99999999").write_text("{")
    options = ("--dtype", "int4", "--tokenizer", tokenizer)
    export(checkpoint, tmp_path / "out", *options, "--num-nodes", 2)
    order = (partial / ".export.json").read_text()
    assert json.loads(order)["weights"] == "int4"
    assert "other options" in refused(capsys, checkpoint, tmp_path / "out", "--tokenizer", tokenizer)
    assert (partial / ".export.json").read_text() == order
    export(checkpoint, tmp_path / "out", *options, "--node", 1, "--num-nodes", 2)
    assert bytes_in(tmp_path / "out") == bytes_in(exported["int4"])


def test_like_takes_small_files_and_int4_bytes_of_unchanged_weights(
    exported: dict[str, Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    """A released folder by another rule: scales twice as large, a code of -8, keys of its own."""
    like = tmp_path / "like"
    like.mkdir()
    config = json.loads((exported["int4"] / "config.json").read_text()) | {"note": "not ours"}
    (like / "config.json").write_text(json.dumps(config))
    (like / "chat_template.jinja").write_text("{{ messages }}")
    (like / "README.md").write_text("of the other model")
    released = {name: t for name, t in tensors_in(exported["int4"]).items() if ".mlp.experts." in name}
    for name in [name for name in released if name.endswith("_scale")]:
        scale, packed = released[name], released[name.replace("_scale", "_packed")]
        scale *= 2
        packed[0, 0] &= ~0xF
    (like / "model.safetensors").write_bytes(save(released))
    changed = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
    ours = dict(state)
    for name in [name for name in state if ".mlp.experts." in name]:
        ours[name] = dequantize(Int4Weight(released[f"{name}_packed"], released[f"{name}_scale"]))
    ours[changed] = ours[changed] * 1.1
    checkpoint = write_weights(tmp_path / "step_0", MODEL, stacked(ours))
    out = tmp_path / "out"
    export(checkpoint, out, "--dtype", "int4", "--like", like)

    found = tensors_in(out)
    for name, tensor in released.items():
        assert torch.equal(found[name], tensor) == (not name.startswith(changed) or "_shape" in name), name
    assert (out / "config.json").read_bytes() == (like / "config.json").read_bytes()
    assert (out / "chat_template.jinja").exists() and not (out / "README.md").exists()
    # In BF16 nothing is said of INT4.
    export(checkpoint, tmp_path / "bf16", "--like", like)
    assert "quantization" not in (tmp_path / "bf16/config.json").read_text()
    assert json.loads((tmp_path / "bf16/config.json").read_text())["note"] == "not ours"


def test_what_was_trained_as_int4_gets_the_codes_of_its_passes(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next to a folder with codes of another rule for the same weights, of which one is -8; and not next to
    one with other groups."""
    like = tmp_path / "like"
    like.mkdir()
    config = json.loads((exported["int4"] / "config.json").read_text())
    (like / "config.json").write_text(json.dumps(config))
    state = dict(released_state(MODEL))
    experts = [name for name in state if ".mlp.experts." in name]
    released = {}
    for name in experts:
        codes = quantize(state[name])
        codes.packed[0, 0] &= ~0xF
        released |= {f"{name}_packed": codes.packed, f"{name}_scale": codes.scale}
        state[name] = dequantize(codes)
    (like / "model.safetensors").write_bytes(save(released))
    model = replace(MODEL, quantization=Quantization.int4_qat)
    checkpoint = write_weights(tmp_path / "step_0", model, stacked(state))
    export(checkpoint, tmp_path / "out", "--dtype", "int4", "--like", like)
    found = tensors_in(tmp_path / "out")
    for name in experts:
        served = dequantize(Int4Weight(found[f"{name}_packed"], found[f"{name}_scale"]))
        assert torch.equal(served, fake_quantize(state[name]))
        assert not torch.equal(found[f"{name}_packed"], released[f"{name}_packed"])

    config["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    (like / "config.json").write_text(json.dumps(config))
    message = refused(capsys, checkpoint, tmp_path / "other", "--dtype", "int4", "--like", like)
    assert "'group_size': 128" in message and "trained as symmetric INT4 in groups of 32" in message


@pytest.mark.parametrize("kind", ["Moonlight", "Kimi-K2"])
def test_text_models_have_names_without_a_prefix(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    plain = replace(plain_rope(), original_max_position=2048)
    changes: dict[str, Any] = {"q_lora_rank": None, "rope": plain} if kind == "Moonlight" else {}
    model = tiny_model_config(vocab_size=VOCAB_SIZE, **changes)
    state = {n: t for n, t in released_state(model).items() if n.startswith("language_model.")}
    checkpoint = write_weights(tmp_path / "step_0", model, stacked(state))
    export(checkpoint, tmp_path / "out", "--tokenizer", tokenizer)
    found = tensors_in(tmp_path / "out")
    assert found.keys() == {name.removeprefix("language_model.") for name in state}
    assert ("model.layers.0.self_attn.q_proj.weight" in found) == (kind == "Moonlight")
    assert {"lm_head.weight", "model.norm.weight"} < found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[f"language_model.{name}"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "vision_config" not in config


def test_masters_are_rounded(
    checkpoint: Path, state: dict[str, Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    ours = stacked(state)
    masters = {
        f"optimizer.state.param.{name}": tensor.float() * 1.01
        for name, tensor in ours.items()
        if "expert_bias" not in name
    }
    trained = write_weights(tmp_path / "step_0", MODEL, ours | masters)
    export(trained, tmp_path / "out", "--from-masters", "--tokenizer", tokenizer)
    found = tensors_in(tmp_path / "out")
    name = "language_model.model.norm.weight"
    assert torch.equal(found[name], (state[name].float() * 1.01).to(torch.bfloat16))
    assert found["language_model.model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_an_interrupted_export_goes_on(
    exported: dict[str, Path],
    checkpoint: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    export(checkpoint, out, "--dtype", "int4", "--tokenizer", tokenizer, "--num-nodes", 2)
    partial = tmp_path / "out.partial"
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    # What killed processes leave, of another node and of this one; the number is that of no process.
    (partial / ".model-00002-of-000006.safetensors.host.1").write_bytes(b"half of it")
    own = partial / f".model-00004-of-000006.safetensors.{socket.gethostname()}.99999999"
    own.write_bytes(b"")
    for options in (["bf16"], ["int4", "--shard-gb", 1], ["int4", "--text-only"]):
        message = refused(capsys, checkpoint, out, "--tokenizer", tokenizer, "--dtype", *options)
        assert "was begun by an export of another checkpoint or with other options" in message
    export(checkpoint, out, "--dtype", "int4", "--tokenizer", tokenizer)
    assert "3 of 6 files are there already" in capsys.readouterr().out
    assert {path: (out / path.name).stat().st_mtime_ns for path in before} == before
    assert bytes_in(out) == bytes_in(exported["int4"])
    assert not partial.exists()
    assert "is there already; export into another folder" in refused(
        capsys, checkpoint, out, "--dtype", "int4", "--tokenizer", tokenizer
    )


def test_without_room_nothing_is_begun(
    checkpoint: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    message = refused(capsys, checkpoint, tmp_path / "out", "--tokenizer", tokenizer)
    assert "but 1,000 are free there: make room" in message
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_files_of_a_given_size(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", "--shard-gb", "0.00005", "--tokenizer", tokenizer)
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 6
    # A larger tensor is alone.
    assert all(sum(t.nbytes for t in file.values()) <= 50_000 or len(file) == 1 for file in files)
    tensors_in(tmp_path / "out")


def test_refusals(
    checkpoint: Path,
    exported: dict[str, Path],
    state: dict[str, Tensor],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert "name the vocabulary with --tokenizer FILE" in refused(capsys, checkpoint, out)
    assert "--node 2: must be 0 to 1" in refused(capsys, checkpoint, out, "--node", 2, "--num-nodes", 2)
    assert "has no masters" in refused(capsys, checkpoint, out, "--from-masters")
    assert "is not a checkpoint" in refused(capsys, exported["bf16"], out)
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints/step_0")
    assert "holds step_0: name one, as " in refused(capsys, run, out)
    other = write_weights(
        tmp_path / "other", tiny_model_config(vocab_size=VOCAB_SIZE, num_layers=4), stacked(state)
    )
    message = refused(capsys, other, out, "--tokenizer", tokenizer)
    assert "it lacks language_model.decoder.layers.3." in message
    message = refused(capsys, other, out, "--like", exported["int4"])
    assert "it lacks" in message or "num_hidden_layers: 3 there, 4 here" in message
    message = refused(capsys, checkpoint, out, "--text-only", "--like", exported["int4"])
    assert "is of a model with vision, but the export is of text alone" in message
    assert "name a Hugging Face folder" in refused(capsys, checkpoint, out, "--like", tmp_path)
    assert not out.exists()


def test_another_vocabulary_is_refused(
    state: dict[str, Tensor], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with more ids than the model has, whose `[EOS]` would be none of them, and one of another run."""
    fact = {"data.tokenizer": f"sha256 {hashlib.sha256(tokenizer.read_bytes()).hexdigest()}"}
    smaller = tiny_model_config(vocab_size=VOCAB_SIZE - 1)
    weights = stacked(released_state(smaller))
    checkpoint = write_weights(tmp_path / "smaller", smaller, weights)
    message = refused(capsys, checkpoint, tmp_path / "out", "--tokenizer", tokenizer)
    assert "has 320 ids, but the model has 319" in message
    trained = write_weights(tmp_path / "step_0", MODEL, stacked(state), facts=fact)
    changed = tmp_path / "tokenizer.json"
    changed.write_bytes(tokenizer.read_bytes() + b" ")
    message = refused(capsys, trained, tmp_path / "out", "--tokenizer", changed)
    assert "the run was trained with one of sha256" in message
    export(trained, tmp_path / "out", "--tokenizer", tokenizer)


@pytest.mark.parametrize(
    "words",
    [
        ("s3://bucket/out",),
        ("out", "--shard-gb", "0"),
        ("out", "--shard-gb", "nan"),
        ("out", "--workers", "-1"),
    ],
    ids=" ".join,
)
def test_arguments_that_mean_nothing(
    words: tuple[str, ...], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be" in refused(capsys, checkpoint, *words)


def test_a_damaged_checkpoint_gives_no_folder(
    state: dict[str, Tensor], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_weights(tmp_path / "step_0", MODEL, stacked(state), cuts=(0.5, 0.5))
    path = checkpoint / "rank_00001_0.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    message = refused(capsys, checkpoint, tmp_path / "out", "--tokenizer", tokenizer)
    assert "rank_00001_0.safetensors" in message
    assert not (tmp_path / "out").exists()
