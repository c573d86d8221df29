"""Whether the weights of one model fit another, by their configurations alone; without torch."""

from collections.abc import Sequence
from typing import Any

from k25_train.config.checkpoint import INIT_PARTS
from k25_train.config.leaves import leaves, plain_values
from k25_train.config.model import ModelConfig
from k25_train.parameters import table
from k25_train.parameters.entry import fill

TRAINS_ON = (
    "name",
    "init_std",
    "balance_loss_coeff",
    "expert_bias_update_rate",
    "quantization",
    "rope.scaling_factor",
    "rope.original_max_position",
    "rope.beta_fast",
    "rope.beta_slow",
    "rope.mscale",
    "rope.mscale_all_dim",
    "vision.image_patch_limit",
    "vision.side_patch_limit",
    "vision.frame_patch_limit",
    "vision.video_fps",
)
"""Keys of the model that a run may have otherwise than the source of its weights: the context is stretched on
purpose from stage to stage, experts are rounded from some stage on, and the others are of training or of the
data. Differences are told."""


def names_of(model: ModelConfig) -> list[str]:
    """All weights and buffers of a model, as checkpoints call them."""
    return [fill(entry.stacked_name, number) for entry, number in table.TABLE.places(model)]


def differences(
    section: dict[str, Any], model: ModelConfig, parts: Sequence[str], where: str
) -> tuple[list[str], list[str]]:
    """What a model has otherwise than the one whose `section` is in `where`: lines of what must not differ
    for these parts to fit, and of what may."""
    now: dict[str, Any] = dict(leaves(plain_values(model)))
    takes_text, takes_vision = INIT_PARTS[0] in parts, bool(set(INIT_PARTS[1:]) & set(parts))
    # A projector is as wide as what it projects to.
    of_projector = ("hidden_size",) if INIT_PARTS[2] in parts else ()
    lines = {
        key: f"model.{key}={value} in {where}, {now.get(key)} now"
        for key, value in leaves(section)
        if now.get(key) != value
        and (takes_vision if key.startswith("vision.") else takes_text or key in of_projector)
    }
    wrong = [line for key, line in lines.items() if key not in TRAINS_ON]
    return wrong, [line for key, line in lines.items() if key in TRAINS_ON and key != "name"]
