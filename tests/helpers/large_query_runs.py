"""Runs of a shrunk model with queries that are large from the start, so that its attention logits are."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.gradients import modules_and_places

DIMS = {"nope": 12, "rope": 8, "value": 16}
"""No two alike, so that none can be taken for another."""
NUM_HEADS, NUM_LAYERS, THRESHOLD = 3, 5, 1.0
MODEL = (
    "model.qk_nope_head_dim=12 model.qk_rope_head_dim=8 model.v_head_dim=16 model.num_attention_heads=3 "
    "model.q_lora_rank=40 train.global_batch_size=4"
).split()
CLIP, NO_CLIP = f"optim.qk_clip_threshold={THRESHOLD}", "optim.qk_clip_threshold=null"
ADAMW, MUONCLIP = "optim=adamw", "optim=muonclip"
DIRECT_QUERY = "model.q_lora_rank=null"

PROJECTION = re.compile(
    r"layers\.(\d+)\.self_attention\.(linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.weight$"
)


def global_names(run: Any) -> dict[Tensor, str]:
    """Parameter -> global name; of stacked experts the first one's."""
    return {
        parameter: next(place.global_tensors(name, parameter))[0]
        for module, place in modules_and_places(run)
        for name, parameter in module.module.named_parameters()
    }


def enlarge_queries(run: Any, factor: float, layers: Sequence[int], heads: Sequence[int]) -> None:
    """Multiply the query weights of these heads in these layers, weights and masters."""
    with torch.no_grad():
        for parameter, name in global_names(run).items():
            projection = PROJECTION.search(name)
            if projection and projection[2] != "linear_kv_up_proj" and int(projection[1]) in layers:
                parameter.view(NUM_HEADS, -1)[list(heads)] *= factor
    run.optimizer.reload_model_params()
