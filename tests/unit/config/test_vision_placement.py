"""Where tower and projector are, for every value of `dep.mode` and the trained parts."""

import pytest

from k25_train.config.vision import VisionPart, VisionPlacement
from parallel.config import DepMode
from tests.helpers.trained import VISION

MERGED, HIDDEN = 48, 64
BOTH, TOWER, PROJECTOR, NONE = {*VisionPart}, {VisionPart.tower}, {VisionPart.projector}, set()


@pytest.mark.parametrize(
    ("mode", "trained", "encoder", "first_stage", "trained_parts"),
    [
        ("coupled", "all", NONE, BOTH, BOTH),
        ("coupled", "projector", NONE, BOTH, PROJECTOR),
        ("coupled", "nothing", NONE, BOTH, NONE),
        ("decoupled", "all", BOTH, NONE, BOTH),
        ("decoupled", "projector", TOWER, PROJECTOR, PROJECTOR),
        ("decoupled", "nothing", BOTH, NONE, NONE),
    ],
)
def test_every_mode_has_one_placement(
    mode: str,
    trained: str,
    encoder: set[VisionPart],
    first_stage: set[VisionPart],
    trained_parts: set[VisionPart],
) -> None:
    found = VisionPlacement.of(DepMode(mode), VISION[trained], merged_size=MERGED, hidden_size=HIDDEN)
    assert (found.encoder_parts, found.first_stage_parts, found.trained_parts) == (
        encoder,
        first_stage,
        trained_parts,
    )
    assert found.frozen_parts == BOTH - trained_parts
    assert found.trained_encoder_parts in (encoder, NONE), "an encoder is trained whole, or not at all"
    assert found.trained_encoder_parts | found.trained_first_stage_parts == trained_parts
    assert found.feature_width == (HIDDEN if VisionPart.projector in encoder else MERGED)


def test_a_part_is_known_by_its_parameters_names() -> None:
    assert VisionPart.of("vision_tower.encoder.blocks.0.wqkv.weight") is VisionPart.tower
    assert VisionPart.of("mm_projector.proj.0.bias") is VisionPart.projector
    assert VisionPart.of("language_model.output_layer.weight") is None
