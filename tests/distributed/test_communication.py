"""What real ranks send in a step is what the formula says, by kind."""

from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.vision import PROJECTOR, TOWER
from k25_train.plan.time.communication import communication
from tests.helpers.runs import layout, overrides
from tests.helpers.step_traffic import count
from tests.helpers.trained import trained_vision

pytestmark = pytest.mark.distributed

BALANCED = 0.15
"""Routing of few tokens among few experts is not balanced: what leaves a rank may differ so much from the
expected value. What is handed over does not depend on it."""
SCALARS = 208
"""Bytes a rank of single numbers a step: losses, tokens with a loss, norms of gradients and weights by part,
encoders' figures."""
OVERLAP = ("parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true")
CASES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "dp2": ({"dp": 2}, ()),
    "ep2 of dp4, bfloat16": ({"ep": 2, "dp": 4}, ("train.dtype=bfloat16",)),
    "pp2 x vpp2 x ep2": ({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, ()),
    "pp2 x dp2, overlapped": ({"pp": 2, "dp": 2}, OVERLAP),
    "pp3 x vpp2": ({"pp": 3, "vpp": 2}, ()),
    # So many heads that their maxima are more than what single numbers may come to.
    "dp2, QK-Clip": ({"dp": 2}, ("optim.qk_clip_threshold=1", "model.num_attention_heads=16")),
    "dp2, AdamW": ({"dp": 2}, ("optim=adamw",)),
    "pp2 x dp2, projector alone": (
        {"pp": 2, "dp": 2},
        ("optim.vision_tower.trained=false",),
    ),
    "dp2, frozen tower and projector": (
        {"dp": 2},
        (*trained_vision("nothing"),),
    ),
    "dp4, matrices in bfloat16": ({"dp": 4}, ("optim.muon.exchange_dtype=bfloat16",)),
}


@pytest.mark.parametrize("name", CASES)
def test_counted_is_what_the_formula_says(name: str, data: Path, tmp_path: Path) -> None:
    sizes, more = CASES[name]
    bytes_of_weight = 2 if "train.dtype=bfloat16" in more else 4
    arguments = overrides(data, tmp_path, *layout(**sizes), *more)
    config = compose(arguments)
    expected = communication(config)
    counted = count(arguments, config.world_size)
    of_data = {"features", "bookkeeping"}
    assert set(counted.payload) - of_data == set(expected) - of_data
    # Each token's feature once and, for a trained tower, its gradient once, but for those that stay on their
    # rank.
    is_trained = config.optim.trained_vision == TOWER | PROJECTOR
    of_projector = config.optim.trained_vision == PROJECTOR
    width = config.model.vision.merged_size if of_projector else config.model.hidden_size
    all_features = (1 + is_trained) * counted.vision_tokens * width * bytes_of_weight
    assert 0 < counted.payload["features"] == counted.features <= all_features
    if "matrices" in expected:
        assert counted.payload["matrices"] == expected["matrices"].payload_bytes
        assert 0 < counted.sent["matrices"] < expected["matrices"].sent_bytes
    # Stages send padding, too, but it goes to no expert.
    share_of_tokens = counted.tokens / (config.train.global_batch_size * config.train.seq_len)
    assert share_of_tokens < 1
    for kind in expected.keys() - {"reduce-scatter", "all-gather", "matrices", "bookkeeping"}:
        share, tolerance = (1.0, 0.0) if kind == "pipeline" else (share_of_tokens, BALANCED)
        assert counted.payload[kind] == pytest.approx(share * expected[kind].payload_bytes, rel=1e-12)
        assert counted.sent[kind] == pytest.approx(share * expected[kind].sent_bytes, rel=tolerance)
    for kind, of_one in (("reduce-scatter", 4), ("all-gather", bytes_of_weight)):
        if kind in expected:
            assert counted.payload[kind] == expected[kind].payload_bytes + of_one * counted.padding
    for figures, of_kind in ((counted.payload, "payload_bytes"), (counted.sent, "sent_bytes")):
        known = getattr(expected["bookkeeping"], of_kind) if "bookkeeping" in expected else 0
        assert 0 <= figures["bookkeeping"] - known < 2 * SCALARS * config.world_size
