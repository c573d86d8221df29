"""The files of an exported folder next to its weights: configuration, tokenizer and processor."""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k25_train.config.model import INT4_GROUP, ModelConfig, Quantization
from k25_train.data.kimi_tokens import KIMI_NUM_SPECIAL_TOKENS, KIMI_SPECIAL_OFFSETS
from k25_train.data.tokenizer import Tokenizer, TrainedTokenizer, load_tokenizer
from k25_train.errors import CheckpointError
from k25_train.export.hf_config import SpecialIds, config_json, generation_config_json, text_config_json
from k25_train.export.hf_processor import (
    preprocessor_config_json,
    tokenizer_config_json,
    video_preprocessor_config_json,
)
from k25_train.export.like import CONFIG, ReleasedFolder
from k25_train.export.listing import Contents, WeightFormat
from k25_train.export.quantization import int4_config

KIMI_VOCAB_SIZE = 163840
DTYPES = {WeightFormat.bf16: "bfloat16", WeightFormat.int4: "bfloat16", WeightFormat.float32: "float32"}
"""What is not packed."""
QUANTIZATION = "quantization_config"
_PACKED_KEYS = ("num_bits", "group_size", "symmetric")
"""What makes packed weights another thing."""
TOKENIZER_FACT = "data.tokenizer"
"""Of `k25_train/data/fingerprint.py`."""
_SAME_MODEL = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "n_shared_experts n_routed_experts num_experts_per_tok first_k_dense_replace routed_scaling_factor "
    "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rms_norm_eps"
).split()
"""Keys of config.json that have to be as in the checkpoint; others may have been changed by hand."""
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""Of the release's code and transformers 5.23."""


def files_like(
    released: ReleasedFolder, model: ModelConfig, contents: Contents, weights: WeightFormat
) -> dict[str, str]:
    """config.json of a released folder, with INT4 said or not said; its other small files are copied.

    The rotation is the checkpoint's: a stage of training stretches it, and by another one the weights would
    compute something else without a word.

    Raises `CheckpointError` if it is of another model.
    """
    if contents is not released.contents:
        raise CheckpointError(
            f"{released.folder / CONFIG} is of a model {_with(released.contents)}, but the export is "
            f"{_with(contents)}; name a released folder of its kind, or none"
        )
    expected = text_config_json(model, _kimi_ids(), DTYPES[weights])
    released.check_fits({key: expected[key] for key in _SAME_MODEL})
    config = copy.deepcopy(released.config)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    is_packed = any(_is_as_packed_here(part.get(QUANTIZATION)) for part in parts)
    if model.quantization is Quantization.int4_qat and not is_packed:
        _check_not_packed(parts, released.folder / CONFIG)
    if weights is not WeightFormat.int4 or not is_packed:
        for part in parts:
            part.pop(QUANTIZATION, None)
    if weights is WeightFormat.int4 and not is_packed:
        parts[-1][QUANTIZATION] = int4_config()
    for part in parts:
        part.update({key: DTYPES[weights] for key in ("dtype", "torch_dtype") if key in part})
    if other_rope(released, model):
        text = parts[-1]
        for key in ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"):
            text.pop(key, None)
        ours = ("rope_theta", "rope_scaling", "max_position_embeddings")
        text.update({key: expected[key] for key in ours})
    if config == released.config:
        return {CONFIG: (released.folder / CONFIG).read_text(encoding="utf-8")}
    return {CONFIG: _text(config)}


def other_rope(released: ReleasedFolder, model: ModelConfig) -> bool:
    """Whether a released folder rotates otherwise than the model of the checkpoint."""
    expected = text_config_json(model, _kimi_ids(), DTYPES[WeightFormat.bf16])
    newer = released.text_config.get("rope_parameters") or {}
    theirs = newer or released.text_config.get("rope_scaling") or {}
    theta = newer.get("rope_theta", released.text_config.get("rope_theta"))
    is_yarn = theirs.get("rope_type", theirs.get("type", "default")) != "default"
    ours = expected["rope_scaling"] or {}
    return (
        theta != expected["rope_theta"]
        or is_yarn != bool(ours)
        or any(theirs.get(key, _YARN_DEFAULTS.get(key)) != ours[key] for key in ours if key != "type")
    )


def _is_as_packed_here(scheme: object) -> bool:
    """Whether a `quantization_config` says of its groups what is written here."""
    if not isinstance(scheme, dict) or scheme.get("format") != "pack-quantized":
        return False
    written = int4_config()["config_groups"]["group_0"]["weights"]
    groups = scheme.get("config_groups") or {}
    return all(
        group.get("weights", {}).get(key) == written[key] for group in groups.values() for key in _PACKED_KEYS
    )


def _check_not_packed(parts: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Raise `CheckpointError` if a released folder has integers in another form than experts trained as INT4
    have: who serves it is set up for these."""
    for scheme in filter(None, (part.get(QUANTIZATION) for part in parts)):
        if scheme.get("quant_method") == "compressed-tensors":
            groups = scheme.get("config_groups") or {}
            told = [
                {key: weights.get(key) for key in _PACKED_KEYS}
                for weights in (group.get("weights") or {} for group in groups.values())
            ]
            raise CheckpointError(
                f"{path}: {QUANTIZATION} has {scheme.get('format')} {told}, but the checkpoint's experts "
                f"were trained as symmetric INT4 in groups of {INT4_GROUP} (model.quantization=int4_qat); "
                "name a folder with such weights, or with plain ones"
            )


def own_files(
    model: ModelConfig,
    contents: Contents,
    weights: WeightFormat,
    tokenizer: Path | None,
    facts: Mapping[str, str],
) -> dict[str, str]:
    """What can be written without a released folder: name -> text.

    Args:
        tokenizer: the `tokenizer.json` or `tiktoken.model` of the data; None for the release's vocabulary.
        facts: of the checkpoint's manifest; a run's say which vocabulary it was trained with.

    Raises `CheckpointError` if nothing says which ids end a text and stand for media, or the vocabulary is
    another one than the run's.
    """
    quantization = int4_config() if weights is WeightFormat.int4 else None
    vocabulary = None if tokenizer is None else load_tokenizer(tokenizer)
    if vocabulary is not None:
        _check_vocabulary(vocabulary, str(tokenizer), model, facts)
    ids = _ids_of(vocabulary, model)
    of_contents = config_json if contents is Contents.all else text_config_json
    files: dict[str, Mapping[str, Any]] = {
        CONFIG: of_contents(model, ids, DTYPES[weights], quantization),
        "generation_config.json": generation_config_json(model, ids),
    }
    if contents is Contents.all:
        files["preprocessor_config.json"] = preprocessor_config_json(model.vision)
        files["video_preprocessor_config.json"] = video_preprocessor_config_json(model.vision)
    texts = {name: _text(values) for name, values in files.items()}
    if tokenizer is not None and isinstance(vocabulary, TrainedTokenizer):
        chat_tokens = bool(vocabulary.chat_ids)
        texts["tokenizer_config.json"] = _text(tokenizer_config_json(model, chat_tokens=chat_tokens))
        texts["tokenizer.json"] = Path(tokenizer).read_text(encoding="utf-8")
    elif tokenizer is not None:
        texts["tiktoken.model"] = Path(tokenizer).read_text(encoding="utf-8")
    return texts


def _check_vocabulary(vocabulary: Tokenizer, path: str, model: ModelConfig, facts: Mapping[str, str]) -> None:
    if vocabulary.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"--tokenizer {path}: has {vocabulary.vocab_size:,} ids, but the model has {model.vocab_size:,}; "
            "name the vocabulary that the run was trained with"
        )
    trained_with = facts.get(TOKENIZER_FACT, "")
    if trained_with not in ("", f"sha256 {vocabulary.sha256}"):
        raise CheckpointError(
            f"--tokenizer {path}: has sha256 {vocabulary.sha256}, but the run was trained with one of "
            f"{trained_with}; name that one"
        )


def _ids_of(tokenizer: Tokenizer | None, model: ModelConfig) -> SpecialIds:
    if tokenizer is None:
        if model.vocab_size != KIMI_VOCAB_SIZE:
            raise CheckpointError(
                f"model.vocab_size={model.vocab_size} is not the release's {KIMI_VOCAB_SIZE}: name the "
                "vocabulary with --tokenizer FILE, or a released folder of the same model with --like DIR"
            )
        return _kimi_ids()
    return SpecialIds.of(tokenizer)


def _kimi_ids() -> SpecialIds:
    first = KIMI_VOCAB_SIZE - KIMI_NUM_SPECIAL_TOKENS
    ids = {token: first + offset for token, offset in KIMI_SPECIAL_OFFSETS.items()}
    return SpecialIds(
        bos=ids["[BOS]"],
        eos=ids["[EOS]"],
        pad=ids["[PAD]"],
        media_begin=ids["<|media_begin|>"],
        media_end=ids["<|media_end|>"],
        media_pad=ids["<|media_pad|>"],
        turn_end=ids["<|im_end|>"],
    )


def _with(contents: Contents) -> str:
    return "with vision" if contents is Contents.all else "of text alone"


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
