"""Where the vision tower and its projector are, and which of them are trained."""

from dataclasses import dataclass
from enum import Enum

from parallel.config import DepMode


class VisionPart(Enum):
    """The two parts of vision; values are the first component of their parameters' names."""

    tower = "vision_tower"
    """MoonViT-3D."""
    projector = "mm_projector"
    """From merged patches to the language model's width."""

    @classmethod
    def of(cls, parameter: str) -> "VisionPart | None":
        """The part that a parameter belongs to, by its name, ours or the checkpoint's; None if to neither."""
        root = parameter.split(".", 1)[0]
        return _PARTS.get(root)


_PARTS = {part.value: part for part in VisionPart}
TOWER, PROJECTOR = frozenset([VisionPart.tower]), frozenset([VisionPart.projector])


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionPlacement:
    """Where tower and projector are and what of them is trained (`dep.mode` and `optim.vision.trained`)."""

    encoder_parts: frozenset[VisionPart]
    """Parts of the decoupled encoder, of which every rank has a replica; none if the tower is coupled."""
    first_stage_parts: frozenset[VisionPart]
    """Parts in the first pipeline stage, which are the ones that the encoder does not have."""
    trained_parts: frozenset[VisionPart]
    """Parts whose weights are updated; the others have neither gradients nor optimizer state."""
    feature_width: int
    """Numbers that a vision token is sent as, from the encoder to a first stage."""

    @classmethod
    def of(
        cls, mode: DepMode, trained_parts: frozenset[VisionPart], *, merged_size: int, hidden_size: int
    ) -> "VisionPlacement":
        """The placement that follows from the configuration.

        A projector that is trained behind a frozen tower is in the first stage, decoupled or not: no gradient
        has to leave that stage then.

        Args:
            mode: where the tower runs.
            trained_parts: parts whose weights are updated.
            merged_size: width of what the tower gives for a token, before the projector.
            hidden_size: width of the language model, after the projector.
        """
        encoder_parts = frozenset[VisionPart]()
        if mode is DepMode.decoupled:
            encoder_parts = TOWER if trained_parts == PROJECTOR else TOWER | PROJECTOR
        return cls(
            encoder_parts=encoder_parts,
            first_stage_parts=(TOWER | PROJECTOR) - encoder_parts,
            trained_parts=trained_parts,
            feature_width=hidden_size if VisionPart.projector in encoder_parts else merged_size,
        )

    @property
    def trained_encoder_parts(self) -> frozenset[VisionPart]:
        """Parts that are updated on every rank: all of the decoupled encoder, or nothing of it."""
        return self.trained_parts & self.encoder_parts

    @property
    def trained_first_stage_parts(self) -> frozenset[VisionPart]:
        """Parts that are updated in the first stage."""
        return self.trained_parts & self.first_stage_parts

    @property
    def frozen_parts(self) -> frozenset[VisionPart]:
        """Parts that keep their weights."""
        return (TOWER | PROJECTOR) - self.trained_parts
