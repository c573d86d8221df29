"""What a Hugging Face config.json says of a model, in the keys of `ModelConfig`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.compose.conf_files import CONF_DIR, group_values
from k25_train.compose.sections import build_section
from k25_train.compose.trainable import planned_alone
from k25_train.config.checkpoint import INIT_PARTS
from k25_train.config.leaves import leaves, plain_values
from k25_train.config.model import ModelConfig
from k25_train.convert.hf_limits import ROPE, TEXT, TIED, VISION, check_fixed, check_quantization
from k25_train.errors import CheckpointError

LANGUAGE_MODEL, TOWER, _ = INIT_PARTS
BASE_MODEL = "k25_1t"
"""Whose values a model has that config.json does not tell: those of the release's own code, and rates that
only training uses."""

TEXT_KEYS = {
    "num_layers": ("num_hidden_layers",),
    "num_dense_layers": ("first_k_dense_replace",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "dense_ffn_hidden_size": ("intermediate_size",),
    "expert_ffn_hidden_size": ("moe_intermediate_size",),
    "num_experts": ("n_routed_experts",),
    "num_experts_per_token": ("num_experts_per_tok",),
    "num_shared_experts": ("n_shared_experts",),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "rms_norm_eps": ("rms_norm_eps",),
    "vocab_size": ("vocab_size",),
}
"""Key of `ModelConfig` -> keys of config.json or its text_config, of which the first that is there counts."""
VISION_KEYS = {
    "patch_size": ("patch_size",),
    "num_layers": ("vt_num_hidden_layers", "num_hidden_layers"),
    "hidden_size": ("vt_hidden_size", "hidden_size"),
    "ffn_hidden_size": ("vt_intermediate_size", "intermediate_size"),
    "num_attention_heads": ("vt_num_attention_heads", "num_attention_heads"),
    "pos_emb_height": ("init_pos_emb_height", "pos_emb_height"),
    "pos_emb_width": ("init_pos_emb_width", "pos_emb_width"),
    "pos_emb_time": ("init_pos_emb_time", "pos_emb_time"),
}
"""The same of the vision section."""
ROPE_KEYS = {
    "scaling_factor": "factor",
    "original_max_position": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""The same of YaRN's."""
FRACTIONS = ("routed_scaling_factor", "rms_norm_eps")
"""What is no whole number, though it may be written as one."""
REPEATED, MOST_REPEATED = ("num_layers", "num_experts"), 4096
"""What there are many of, and more than any model has: tensors of a folder from elsewhere are listed."""
SIGLIP = ("siglip", "siglip_vision_model")


@dataclass(frozen=True, slots=True)
class Described:
    """What config.json says."""

    parts: tuple[str, ...]
    """Parts of the model that the folder should hold."""
    values: Mapping[str, Any]
    """Dotted key below `model` -> value, of what it tells about these parts."""


def describe(config: Mapping[str, Any], path: Path) -> Described:
    """Parts and values of a model.

    Raises CheckpointError for a kind of model that is not known, and for one that ours cannot be.
    """
    check_quantization(config, path)
    kind = config.get("model_type")
    if kind in ("kimi_k25", "kimi_vl"):
        check_fixed(config, TIED, path)
        values = _text(_section(config, "text_config", path), path)
        return Described(INIT_PARTS, values | _vision(_section(config, "vision_config", path), path))
    if kind in ("deepseek_v3", "kimi_k2"):
        return Described((LANGUAGE_MODEL,), _text(config, path))
    if kind == "moonvit":
        return Described((TOWER,), _vision(config, path))
    if kind in SIGLIP:
        section = _section(config, "vision_config", path) if "vision_config" in config else config
        return Described((TOWER,), _vision(section, path))
    raise CheckpointError(
        f"{path}: model_type is {kind!r}; known are kimi_k25, kimi_vl, kimi_k2, deepseek_v3, moonvit, siglip"
    )


def model_of(described: Described, choice: str | None, path: Path) -> ModelConfig:
    """The model that the folder holds, its parts alone being meant.

    Args:
        described: by `describe`.
        choice: a name in `conf/model` or a YAML file with a model section; None takes the one of `conf/model`
            that agrees and can be trained, or fills in what config.json does not tell from `BASE_MODEL`.
        path: config.json, for errors.

    Raises CheckpointError with every key that differs from the chosen one, ConfigError for a file that is no
    model section.
    """
    if choice is not None:
        model = _read_model(choice)
        if differences := differing(described.values, model):
            raise CheckpointError(
                "\n".join([f"{path}: is another model than --model {choice}:", *differences])
                + "\n  -> choose another, or leave --model out to take what config.json says"
            )
        return model
    for file in sorted((CONF_DIR / "model").glob("*.yaml")):
        model = _built(group_values("model", file), str(file))
        if not differing(described.values, model) and not planned_alone(model):
            return model
    values = plain_values(_read_model(BASE_MODEL))
    for key, value in described.values.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    values["name"] = re.sub(r"[^A-Za-z0-9_.-]", "_", path.parent.resolve().name) or "imported"
    return _built(values, str(path))


def differing(values: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """A line for each key whose value the model has otherwise."""
    ours = dict(leaves(plain_values(model)))
    # Plain RoPE uses none of YaRN's.
    unused = [key for key in _YARN if values.get("rope.scaling_factor") == ours["rope.scaling_factor"] == 1.0]
    return [
        f"  model.{key}={ours[key]}, but {value} in config.json"
        for key, value in values.items()
        if key not in unused and ours[key] != value
    ]


_YARN = ("rope.beta_fast", "rope.beta_slow", "rope.mscale", "rope.mscale_all_dim")


def _read_model(choice: str) -> ModelConfig:
    path = Path(choice) if choice.endswith((".yaml", ".yml")) else CONF_DIR / "model" / f"{choice}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in (CONF_DIR / "model").glob("*.yaml")))
        raise CheckpointError(f"--model {choice}: is neither one of {names} nor a YAML file that is there")
    model = _built(group_values("model", path), str(path))
    if problems := planned_alone(model):
        lines = [f"{path}: is no model that can be built:"]
        lines += [f"model.{key}={value}: {rule}\n  -> {remedy}" for key, value, rule, remedy in problems]
        raise CheckpointError("\n".join(lines))
    return model


def _built(values: Mapping[str, Any], source: str) -> ModelConfig:
    model, problems = build_section(values, ModelConfig, "model")
    if model is not None:
        problems += [problem.under("model") for problem in model.problems()]
    if problems:
        raise CheckpointError("\n".join([f"{source}: is no model that can be trained:", *map(str, problems)]))
    assert isinstance(model, ModelConfig)
    return model


def _section(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path}: has no {name}, which a {config.get('model_type')} has")
    return section


def _text(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    heads = config.get("num_attention_heads")
    has_groups = config.get("num_key_value_heads", heads) != heads
    grouped = ["num_key_value_heads: must be num_attention_heads"] if has_groups else []
    check_fixed(config, TEXT, path, grouped)
    return _values(config, TEXT_KEYS, "", path) | _rope(config, path)


def _rope(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Rotation, by `rope_theta` and `rope_scaling`, or by transformers 5's `rope_parameters`."""
    newer = config.get("rope_parameters") or {}
    yarn = newer or config.get("rope_scaling") or {}
    if not isinstance(newer, dict) or not isinstance(yarn, dict):
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling must be sections")
    check_fixed(yarn, ROPE, path)
    theta = newer.get("rope_theta", config.get("rope_theta"))
    if not isinstance(theta, int | float):
        raise CheckpointError(f"{path}: has no rope_theta")
    kind = yarn.get("rope_type", yarn.get("type", "default"))
    if kind == "default":
        plain_values = {"rope.theta": float(theta), "rope.scaling_factor": 1.0}
        longest = config.get("max_position_embeddings")
        return plain_values | ({"rope.original_max_position": longest} if isinstance(longest, int) else {})
    if kind != "yarn":
        raise CheckpointError(f"{path}: rope of type {kind!r}; known are yarn and plain ones")
    missing = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    values: dict[str, Any] = {"rope.theta": float(theta)}
    for ours, theirs in ROPE_KEYS.items():
        value = yarn.get(theirs, missing.get(ours))
        if not isinstance(value, int | float):
            raise CheckpointError(f"{path}: YaRN without {theirs}")
        values[f"rope.{ours}"] = int(value) if ours == "original_max_position" else float(value)
    return values


def _vision(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if config.get("model_type") in SIGLIP:
        return _values(config, {key: VISION_KEYS[key] for key in list(VISION_KEYS)[:5]}, "vision.", path)
    values = _values(config, VISION_KEYS, "vision.", path, optional=("pos_emb_time", "ffn_hidden_size"))
    check_fixed(config, VISION, path)
    merge = config.get("merge_kernel_size", [2, 2])
    if merge != [2, 2]:
        raise CheckpointError(f"{path}: merge_kernel_size {merge}: the projector merges 2 x 2 patches")
    return values | {"vision.merge_size": 2}


def _values(
    config: Mapping[str, Any],
    keys: Mapping[str, Iterable[str]],
    prefix: str,
    path: Path,
    optional: Iterable[str] = (),
) -> dict[str, Any]:
    values = {}
    for ours, theirs in keys.items():
        name = next((each for each in theirs if each in config), None)
        if name is None and ours in optional:
            continue
        value = None if name is None else config[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and not (ours == "q_lora_rank" and value is None):
            raise CheckpointError(f"{path}: {name or ' or '.join(theirs)} is {value!r}, no number")
        if ours in REPEATED and value not in range(MOST_REPEATED + 1):
            raise CheckpointError(f"{path}: {name} is {value!r}; it must be 0 to {MOST_REPEATED}")
        values[prefix + ours] = float(config[name]) if name in FRACTIONS else value
    return values
