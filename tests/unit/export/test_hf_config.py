"""The JSON files of an exported folder, as their readers understand them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.model import ModelConfig
from k25_train.errors import CheckpointError
from k25_train.export.hf_config import SpecialIds, config_json, generation_config_json
from k25_train.export.hf_processor import (
    preprocessor_config_json,
    tokenizer_config_json,
    video_preprocessor_config_json,
)
from tests.helpers.hf_reference import hf_config, plain_rope, tiny_model_config
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text

RELEASED_IDS = SpecialIds(
    bos=163584,
    eos=163585,
    pad=163839,
    media_begin=163602,
    media_end=163604,
    media_pad=163605,
    turn_end=163586,
)
TINY_IDS = SpecialIds(bos=0, eos=1, pad=2, media_begin=3, media_end=4, media_pad=254, turn_end=None)


def read_by_transformers(folder: Path, model: ModelConfig) -> Any:
    """config.json of the model, written to the folder and read by transformers."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config_json(model, TINY_IDS, "float32")))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "rope": plain_rope()}], ids=["yarn", "plain"])
def test_transformers_reads_the_model_that_was_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model_config(**changes)
    found, expected = read_by_transformers(tmp_path, model), hf_config(model)
    # What our reference sets for tests alone, and the words of the release, which transformers keeps unread.
    unequal = {"use_cache", "pad_token_id", "dtype", "architectures"}
    for part in ("text_config", "vision_config"):
        ours, theirs = getattr(found, part).to_dict(), getattr(expected, part).to_dict()
        for rope in (ours["rope_parameters"], theirs["rope_parameters"]):
            rope.pop("type", None)
        differing = {key for key in theirs if key not in unequal and ours.get(key) != theirs[key]}
        assert not differing - {"merge_kernel_size"}, {key: (ours.get(key), theirs[key]) for key in differing}
    for key in ("projection_hidden_size", "projection_layer_norm_eps", "image_token_id", "video_token_id"):
        assert getattr(found, key) == getattr(expected, key), key
    assert found.tie_word_embeddings is False and found.text_config.tie_word_embeddings is False


def test_the_released_configuration() -> None:
    model = compose(["experiment=k25_pretrain_4k", "data=smoke", "model.rope.scaling_factor=64"]).model
    written = config_json(model, RELEASED_IDS, "bfloat16", {"quant_method": "compressed-tensors"})
    text, vision = written["text_config"], written["vision_config"]
    assert written["architectures"] == ["KimiK25ForConditionalGeneration"]
    assert written["media_placeholder_token_id"] == 163605
    assert (text["hidden_size"], text["num_hidden_layers"], text["n_routed_experts"]) == (7168, 61, 384)
    assert (text["scoring_func"], text["topk_method"], text["n_group"]) == ("sigmoid", "noaux_tc", 1)
    assert (text["rope_theta"], text["rope_scaling"]["factor"]) == (50000.0, 64.0)
    assert text["max_position_embeddings"] == 262144
    assert text["quantization_config"] == {"quant_method": "compressed-tensors"}
    assert (vision["vt_hidden_size"], vision["vt_intermediate_size"], vision["text_hidden_size"]) == (
        1152,
        4304,
        7168,
    )
    assert preprocessor_config_json(model.vision)["media_proc_cfg"]["in_patch_limit"] == 16384
    assert generation_config_json(model, RELEASED_IDS)["eos_token_id"] == [163585, 163586]


def test_both_vocabularies_of_the_tower_agree() -> None:
    vision = config_json(tiny_model_config(), TINY_IDS, "float32")["vision_config"]
    pairs = {"vt_num_hidden_layers": "num_hidden_layers", "vt_hidden_size": "hidden_size"}
    pairs |= {"vt_intermediate_size": "intermediate_size", "vt_num_attention_heads": "num_attention_heads"}
    pairs |= {f"init_pos_emb_{axis}": f"pos_emb_{axis}" for axis in ("height", "width", "time")}
    assert all(vision[released] == vision[renamed] for released, renamed in pairs.items())


@pytest.mark.parametrize("key", ["latent_norm_eps", "vision.layer_norm_eps", "vision.rope_theta"])
def test_what_no_config_can_say_is_refused(key: str) -> None:
    model, name = tiny_model_config(), key.rpartition(".")[2]
    if key.startswith("vision."):
        changed = replace(model, vision=replace(model.vision, **{name: 3e-5}))
    else:
        changed = replace(model, **{name: 3e-5})
    with pytest.raises(CheckpointError, match=f"model.{key}=3e-05"):
        config_json(changed, TINY_IDS, "float32")


def test_transformers_reads_processor_and_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    from k25_train.data.tokenizer import load_tokenizer, train_tokenizer

    model = tiny_model_config()
    read_by_transformers(tmp_path, model)
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tmp_path / "tokenizer.json")
    files = {
        "preprocessor_config.json": preprocessor_config_json(model.vision),
        "video_preprocessor_config.json": video_preprocessor_config_json(model.vision),
        "tokenizer_config.json": tokenizer_config_json(model, chat_tokens=False),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    processor, ours = AutoProcessor.from_pretrained(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")
    images, videos = processor.image_processor, processor.video_processor
    assert (images.max_patches, images.size.max_height, tuple(images.image_mean)) == (
        1024,
        64,
        (0.5, 0.5, 0.5),
    )
    assert (videos.max_patches, videos.temporal_patch_size, videos.fps) == (256, 4, 2.0)
    assert tuple(videos.image_std) == (0.5, 0.5, 0.5)
    # Special tokens have their ids when written out: that is how a server gets them, unlike training data.
    text = "the red picture"
    ids = processor.tokenizer(f"<|media_begin|>{text}<|media_end|>[EOS]")["input_ids"]
    assert ids == [ours.media_begin, *ours.encode(text), ours.media_end, ours.eos]
