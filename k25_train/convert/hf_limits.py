"""What config.json may not say otherwise: what our model does in one way alone, and number formats.

Whoever ignores such a key trains on other numbers than the folder's own code computes, and nothing tells.
Keys: configuration classes of the releases' code and of transformers 5.23; compressed-tensors 0.20
(`QuantizationArgs`, with its defaults); DeepSeek-V3's `fp8` with `weight_block_size`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from k25_train.convert.number_formats import FP8_BLOCK
from k25_train.errors import CheckpointError
from k25_train.int4 import GROUP_SIZE

Fixed = Mapping[str, tuple[object, ...]]
TIED: Fixed = {"tie_word_embeddings": (False, None)}
"""Of the whole. A file may hold an output head all the same: transformers does not look at it."""
TEXT: Fixed = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "n_group": (1,),
    "topk_group": (1,),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    # transformers' own: rows of q and k in interleaved pairs, as the release has them.
    "rope_interleave": (True, None),
    **TIED,
}
"""What the language model cannot be told to do otherwise -> the values that it behaves as."""
ROPE: Fixed = {"attention_factor": (None,), "truncate": (True, None)}
"""The same of YaRN's: the factor follows from mscale, and the corrected range ends at whole dimensions."""
VISION: Fixed = {
    "merge_type": ("sd2_tpool",),
    "pos_emb_type": ("divided_fixed",),
    "video_attn_type": ("spatial_temporal",),
    "mm_projector_type": ("patchmerger",),
    "projector_hidden_act": ("gelu",),
    "projector_ln_eps": (1e-5,),
    "hidden_act": ("gelu_pytorch_tanh",),
}
"""The same of tower and projector."""
INT4: Fixed = {
    "num_bits": (4,),
    "type": ("int", None),
    "symmetric": (True, None),
    "strategy": ("group", None),
    "group_size": (GROUP_SIZE,),
    # Static orders leave columns where they belong.
    "actorder": (None, False, "static", "weight"),
}
"""Of packed weights."""


def unlike(config: Mapping[str, Any], fixed: Fixed) -> list[str]:
    """A line for each key that has another value."""
    return [
        f"{key}: {config[key]!r} instead of {expected[0]!r}"
        for key, expected in fixed.items()
        if key in config and config[key] not in expected
    ]


def check_fixed(config: Mapping[str, Any], fixed: Fixed, path: Path, more: Iterable[str] = ()) -> None:
    """Raise CheckpointError naming what is said otherwise, `more` of it included."""
    if wrong := [*unlike(config, fixed), *more]:
        raise CheckpointError("\n  ".join([f"{path}: describes a model that ours cannot be:", *wrong]))


def check_quantization(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for a number format by which packed weights would be misread.

    Tensors look alike whatever they stand for: asymmetric codes have the shapes of symmetric ones.
    """
    sections = [each for each in (config, config.get("text_config")) if isinstance(each, dict)]
    schemes = [
        each["quantization_config"] for each in sections if each.get("quantization_config") is not None
    ]
    if wrong := [line for scheme in schemes for line in _problems(scheme)]:
        lines = "".join(f"\n  quantization_config.{line}" for line in wrong)
        raise CheckpointError(
            f"{path}: weights are in a format that is not read:{lines}\n  -> FP8 in blocks of {FP8_BLOCK} x "
            f"{FP8_BLOCK} and symmetric INT4 in groups of {GROUP_SIZE} are; convert it first"
        )


def _problems(scheme: object) -> Iterator[str]:
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    if not isinstance(scheme, dict) or method not in ("fp8", "compressed-tensors"):
        yield f"quant_method: {method!r} instead of 'fp8' or 'compressed-tensors'"
    elif method == "fp8":
        yield from unlike(scheme, {"fmt": ("e4m3",)})
        blocks = scheme.get("weight_block_size")
        if blocks != [FP8_BLOCK, FP8_BLOCK]:
            yield f"weight_block_size: {blocks!r} instead of {[FP8_BLOCK, FP8_BLOCK]}"
    else:
        if scheme.get("format") != "pack-quantized":
            yield f"format: {scheme.get('format')!r} instead of 'pack-quantized'"
        groups = scheme.get("config_groups")
        for name, group in groups.items() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            for line in unlike(weights if isinstance(weights, dict) else {}, INT4):
                yield f"config_groups.{name}.weights.{line}"
