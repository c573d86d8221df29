"""Imported weights are those of the folder, in every number format, whatever forms of names and layouts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.config.model import ModelConfig
from k25_train.convert import __main__ as convert
from k25_train.convert.hf_files import open_folder
from k25_train.convert.importing import Import
from k25_train.convert.number_formats import find_weights, read
from k25_train.convert.unit_writer import interleave, resample
from k25_train.model.moonvit_positions import bicubic_matrix
from tests.helpers import hf_folders
from tests.helpers.hf_folders import k25_config, ours_of, random_state, small_model, write_folder
from tests.helpers.imports import Silent, options_of


def run(*arguments: object) -> int:
    return convert.main(["import", *map(str, arguments)])


def assert_holds(out: Path, expected: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """The checkpoint has these tensors and no others; the router's bias in float32."""
    stored = StoredCheckpoint.open(out)
    assert stored.manifest.kind == "weights"
    assert set(stored.tensors) == set(expected)
    for name, tensor in expected.items():
        kind = torch.float32 if name.endswith("expert_bias") else dtype
        assert stored.tensors[name].dtype is kind, name
        assert stored.tensors[name].shape == tuple(tensor.shape), name
        assert torch.equal(stored.read(name), tensor.to(kind).flatten()), name


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The tests' model in the release's names."""
    return random_state(small_model())


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
@pytest.mark.parametrize("form", ["plain", "INT4", "FP8"])
def test_number_formats(form: str, dtype: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    stored, plain = state, state
    if form == "INT4":
        stored, plain = hf_folders.with_int4_experts(state)
        assert sum(name.endswith("_packed") for name in stored) == 12
    elif form == "FP8":
        stored, plain = hf_folders.with_fp8(state)
        assert sum(name.endswith("_scale_inv") for name in stored) > 20
    source = write_folder(tmp_path / "hf", stored, k25_config(small_model()))
    assert run(source, tmp_path / "out", "--dtype", dtype, "--workers", 1) == 0
    if dtype == "bf16":
        assert_holds(tmp_path / "out", ours_of(plain))
        return
    if form == "plain":
        assert_holds(tmp_path / "out", ours_of(plain), torch.float32)
        return
    # In float32, code times scale is not rounded to bfloat16.
    read_back = StoredCheckpoint.open(tmp_path / "out")
    for name, tensor in ours_of(plain).items():
        assert torch.equal(read_back.read(name).to(tensor.dtype), tensor.flatten()), name


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (128, 128), (64, 384), (257, 130)])
def test_blocks_that_do_not_fill_the_matrix(rows: int, columns: int, tmp_path: Path) -> None:
    """Any run of rows, from any row on, has the scales of its own blocks."""
    codes, scales, values = hf_folders.fp8_blocks(torch.randn(rows, columns))
    folder = open_folder(write_folder(tmp_path / "hf", {"w": codes, "w_scale_inv": scales}, {}, num_files=1))
    weight = find_weights(folder.tensors)["w"]
    for first, last in ((0, rows), (1, rows - 1), (rows // 2, rows // 2 + 1), (rows - 3, rows)):
        assert torch.equal(read(weight, first * columns, last * columns), values[first:last].flatten())


def test_small_units_and_pieces_make_the_same(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are cut into many files and read in many pieces; several workers write them."""
    monkeypatch.setattr("k25_train.convert.importing.MOST_ELEMENTS", 100)
    monkeypatch.setattr("k25_train.convert.importing.LEAST_ELEMENTS", 1)
    stored, plain = hf_folders.with_int4_experts(state)
    source = write_folder(tmp_path / "hf", stored, k25_config(small_model()))
    planned = Import(options_of(source, tmp_path / "out", unit_bytes=4096, num_workers=2))
    assert len(planned.units) > 50
    assert all(unit.num_bytes <= 4096 for unit in planned.units)
    assert planned.run(Silent(), restart=False) == "complete"
    assert_holds(tmp_path / "out", ours_of(plain))


def plain_names(state: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Kimi-K2's and Moonlight's names: the language model alone."""
    prefix = "language_model."
    text = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
    return text, hf_folders.text_config(model)


def nvidia_names(state: Mapping[str, Tensor], model: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """nvidia/Kimi-K2.5-NVFP4's: no `.model`."""
    renamed = {name.replace("language_model.model.", "language_model."): each for name, each in state.items()}
    return renamed, k25_config(model)


def kimi_vl_names(
    state: Mapping[str, Tensor], model: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Kimi-VL's projector and configuration."""
    renamed = {
        name.replace("mm_projector.", "multi_modal_projector.")
        .replace("_projector.proj.0.", "_projector.linear_1.")
        .replace("_projector.proj.2.", "_projector.linear_2."): each
        for name, each in state.items()
    }
    config = {
        "model_type": "kimi_vl",
        "text_config": hf_folders.text_config(model) | {"model_type": "deepseek_v3"},
    }
    return renamed, config | {"vision_config": hf_folders.tower_config(model)}


def moonvit_names(
    state: Mapping[str, Tensor], model: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """MoonViT-SO-400M: the tower alone."""
    prefix = "vision_tower."
    tower = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
    return tower, hf_folders.tower_config(model)


FORMS = {"K2": plain_names, "nvidia": nvidia_names, "Kimi-VL": kimi_vl_names, "MoonViT": moonvit_names}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_names(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, config = FORMS[form](state, small_model())
    source = write_folder(tmp_path / "hf", tensors, config, num_files=1)
    assert run(source, tmp_path / "out", "--workers", 1) == 0
    parts = {"K2": ("language_model",), "MoonViT": ("vision_tower",)}.get(form, ("language", "vision", "mm"))
    expected = {name: each for name, each in ours_of(state).items() if name.startswith(parts)}
    assert_holds(tmp_path / "out", expected)
    # A model that was chosen by name is the same; what is not there is not in the configuration either.
    saved = (tmp_path / "out" / "config.yaml").read_text()
    assert ("vocab_size: 256" in saved, "pos_emb_height: 16" in saved) == (form != "MoonViT", form != "K2")
    assert (tmp_path / "out" / "model.yaml").exists() == (form != "MoonViT")


def test_moonlight_has_direct_queries(tmp_path: Path) -> None:
    model = small_model(q_lora_rank=None, num_shared_experts=2, rope=hf_folders_rope())
    state = random_state(model)
    tensors, config = plain_names(state, model)
    source = write_folder(tmp_path / "hf", tensors, config | {"model_type": "deepseek_v3"})
    assert run(source, tmp_path / "out", "--workers", 1) == 0
    expected = {name: each for name, each in ours_of(state).items() if name.startswith("language_model")}
    assert any("linear_q_proj" in name for name in expected)
    assert_holds(tmp_path / "out", expected)


def hf_folders_rope() -> Any:
    from tests.helpers.hf_reference import plain_rope

    return plain_rope()


def test_siglip_becomes_a_tower(tmp_path: Path) -> None:
    """Rows of q, k and v follow each other; 27 x 27 positions become a table; the text tower is left out."""
    model = small_model()
    state = random_state(model, torch.float32)
    vision, prefix = model.vision, "vision_model.encoder.layers"
    source_state: dict[str, Tensor] = {
        "logit_scale": torch.ones(1),
        "text_model.final_layer_norm.bias": torch.ones(3),
    }
    for kind in ("weight", "bias"):
        source_state[f"vision_model.embeddings.patch_embedding.{kind}"] = state[
            f"vision_tower.patch_embed.proj.{kind}"
        ]
        source_state[f"vision_model.post_layernorm.{kind}"] = state[
            f"vision_tower.encoder.final_layernorm.{kind}"
        ]
        source_state[f"vision_model.head.layernorm.{kind}"] = torch.ones(5)
        for block in range(vision.num_layers):
            ours = f"vision_tower.encoder.blocks.{block}"
            names = {
                "layer_norm1": "norm0",
                "layer_norm2": "norm1",
                "mlp.fc1": "mlp.fc0",
                "mlp.fc2": "mlp.fc1",
            }
            names["self_attn.out_proj"] = "wo"
            for theirs, name in names.items():
                source_state[f"{prefix}.{block}.{theirs}.{kind}"] = state[f"{ours}.{name}.{kind}"]
            for letter, rows in zip("qkv", state[f"{ours}.wqkv.{kind}"].chunk(3), strict=True):
                source_state[f"{prefix}.{block}.self_attn.{letter}_proj.{kind}"] = rows
    positions = torch.randn(7 * 7, vision.hidden_size)
    source_state["vision_model.embeddings.position_embedding.weight"] = positions
    section = {key: value for key, value in hf_folders.tower_config(model).items() if "pos_emb" not in key}
    section |= {"model_type": "siglip_vision_model", "image_size": 98}
    # The table's size is not SigLIP's to say.
    model_file = tmp_path / "model.yaml"
    model_file.write_text(as_yaml(model))
    source = write_folder(tmp_path / "hf", source_state, {"model_type": "siglip", "vision_config": section})
    arguments = ("--dtype", "float32", "--model", model_file, "--workers", 1)
    assert run(source, tmp_path / "out", *arguments) == 0
    expected = {name: each for name, each in ours_of(state).items() if name.startswith("vision_tower")}
    # As the tower itself resamples its table.
    to_16_7 = bicubic_matrix(7, 16, torch.device("cpu"))
    square = positions.view(7, 7, -1)
    table = torch.einsum("hH,wW,HWc->hwc", to_16_7, to_16_7, square)
    stored = StoredCheckpoint.open(tmp_path / "out")
    found = stored.read("vision_tower.patch_embed.pos_emb.weight").view(table.shape)
    torch.testing.assert_close(found, table)
    expected["vision_tower.patch_embed.pos_emb.weight"] = found
    assert_holds(tmp_path / "out", expected, torch.float32)
    assert torch.equal(resample(positions, 7, 7), square), "a table of its own size stays"


def as_yaml(model: ModelConfig) -> str:
    """A model section as a file."""
    from k25_train.compose.yaml_files import dump
    from k25_train.config.leaves import plain_values

    return dump(plain_values(model))


def test_interleaving_undoes_the_librarys_permutation() -> None:
    """A head of 6 rows: transformers takes rows 0, 2, 4 first; two heads do not mix."""
    rows = torch.arange(12.0)[:, None].expand(12, 2)
    theirs = rows.view(2, 3, 2, 2).transpose(1, 2).reshape(12, 2)
    assert theirs[:6, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(interleave(theirs, 2), rows)


@pytest.mark.parametrize("original", [True, False], ids=["released names", "own names"])
def test_a_folder_of_transformers(original: bool, tmp_path: Path) -> None:
    """What `save_pretrained` of transformers' kimi_k25 writes, in both of its forms."""
    from tests.helpers.hf_reference import build_hf_reference

    model = small_model()
    hf_model, state = build_hf_reference(model)
    hf_model.save_pretrained(tmp_path / "hf", max_shard_size="200KB", save_original_format=original)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert run(tmp_path / "hf", tmp_path / "out", "--dtype", "float32", "--workers", 1) == 0
    assert_holds(tmp_path / "out", ours_of(state), torch.float32)
