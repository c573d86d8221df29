"""Which parts of vision are trained, by short names."""

from k25_train.config.parts import EVERY_PART, ModelPart
from k25_train.config.vision import PROJECTOR, TOWER, VisionPart

LANGUAGE_MODEL = frozenset([ModelPart.language_model])
VISION: dict[str, frozenset[VisionPart]] = {
    "all": TOWER | PROJECTOR,
    "projector": PROJECTOR,
    "nothing": frozenset(),
}
"""Name -> parts of vision that are trained."""
TRAINED: dict[str, frozenset[ModelPart]] = {
    "all": EVERY_PART,
    "projector": EVERY_PART - {ModelPart.vision_tower},
    "nothing": LANGUAGE_MODEL,
}
"""The same with the language model, which is trained."""


def trained_vision(which: str) -> tuple[str, ...]:
    """Overrides by which these parts of vision are trained, and no others."""
    parts = {part.value for part in VISION[which]}
    return tuple(f"optim.{part.value}.trained={str(part.value in parts).lower()}" for part in VisionPart)
