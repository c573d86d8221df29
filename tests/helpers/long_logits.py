"""Sequences of 8,192 tokens for a tiny model whose context YaRN stretches to them."""

from dataclasses import replace
from typing import Any

from tests.helpers.hf_comparison import Batches
from tests.helpers.hf_reference import tiny_model_config

IMAGES = ((1, 32, 32), (1, 6, 10), (1, 24, 40), (1, 2, 2))
LONG: Batches = {
    "one text": ((8192,), ()),
    "texts": ((5000, 1, 3191), ()),
    "text and images": ((8192,), IMAGES),
}


def stretched(num_layers: int) -> dict[str, Any]:
    """Changes of the tiny model with which YaRN covers 8,192 positions, 32 times the original ones."""
    rope = replace(tiny_model_config().rope, original_max_position=256, scaling_factor=32.0)
    return {"rope": rope, "num_attention_heads": 2, "num_layers": num_layers}
