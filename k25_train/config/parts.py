"""The parts of the model that are trained, or not, by settings of their own."""

from enum import Enum


class ModelPart(Enum):
    """Parts of the model; values are the first component of their parameters' names."""

    language_model = "language_model"
    """Embedding, decoder layers and head."""
    vision_tower = "vision_tower"
    """MoonViT-3D."""
    mm_projector = "mm_projector"
    """From merged patches to the language model's width."""

    @classmethod
    def of(cls, parameter: str) -> "ModelPart":
        """The part that a parameter belongs to, by its name, ours or the checkpoint's."""
        root = parameter.split(".", 1)[0]
        return _VISION.get(root, cls.language_model)


_VISION = {part.value: part for part in (ModelPart.vision_tower, ModelPart.mm_projector)}
EVERY_PART = frozenset(ModelPart)
