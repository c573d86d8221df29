"""What config.json says of INT4 weights; torch-free."""

from typing import Any

from k25_train.config.model import INT4_GROUP

NOT_QUANTIZED = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    # Not in the first revision of the release, whose tower and projector are bfloat16 all the same.
    "re:.*vision_tower.*",
    "re:.*mm_projector.*",
)
"""Linear layers that stay as they are: all but the routed experts'."""


def int4_config() -> dict[str, Any]:
    """`quantization_config` of the release (compressed-tensors, `pack-quantized`)."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": INT4_GROUP,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(NOT_QUANTIZED),
        "kv_cache_scheme": None,
    }
