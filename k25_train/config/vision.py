"""The vision tower and its projector: dimensions, where they are, and which of them are trained.

Sources: "checkpoint" is the config of the released moonshotai/Kimi-K2.5.
"""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import not_negative
from parallel.config import DepMode, Problem, not_positive


@dataclass(slots=True, kw_only=True)
class VisionConfig:
    """MoonViT-3D, its preprocessing limits, and the projector's 2x2 merge."""

    patch_size: int
    """Edge of a square patch in pixels. Source: checkpoint."""
    num_layers: int
    """Transformer blocks; 0 is a model without vision, of which nothing else in this section is read. Source:
    checkpoint."""
    hidden_size: int
    """Width of a patch's features. Source: checkpoint."""
    ffn_hidden_size: int
    """Width of a block's MLP. Source: checkpoint."""
    num_attention_heads: int
    """Attention heads of a block. Source: checkpoint."""
    pos_emb_height: int
    """Rows of the learned position table, in patches; other heights are interpolated. Source: checkpoint."""
    pos_emb_width: int
    """Columns of the learned position table, in patches. Source: checkpoint."""
    pos_emb_time: int
    """Frames of the fixed temporal table, the most that one chunk has. Source: checkpoint."""
    merge_size: int
    """Edge in patches of the square that becomes one token of the language model. Source: checkpoint."""
    rope_theta: float
    """Base of the 2-D rotation periods. Source: checkpoint's model code."""
    rope_max_grid: int
    """Largest height and width, in patches, of the 2-D rotation table. Source: checkpoint's model code."""
    layer_norm_eps: float
    """Epsilon of the tower's and the projector's layer norms. Source: checkpoint, `projector_ln_eps`."""
    image_patch_limit: int
    """Maximum patches of an image; larger images are scaled down. Source: checkpoint, `in_patch_limit`."""
    side_patch_limit: int
    """Maximum patches along one side. Source: checkpoint, `patch_limit_on_one_side`."""
    frame_patch_limit: int
    """Maximum patches of a video frame. Source: checkpoint, `in_patch_limit_each_frame`."""
    video_fps: float
    """Frames sampled from a second of video. Source: checkpoint, `sample_fps`."""

    @property
    def merged_size(self) -> int:
        """Width of the concatenated features of the patches that become one token of the language model."""
        return self.merge_size**2 * self.hidden_size

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        sizes = (
            "patch_size hidden_size ffn_hidden_size num_attention_heads pos_emb_height "
            "pos_emb_width pos_emb_time merge_size rope_theta rope_max_grid layer_norm_eps "
            "image_patch_limit side_patch_limit frame_patch_limit video_fps"
        )
        found = not_positive(self, sizes.split()) + not_negative(self, ("num_layers",))
        if found:
            return found
        if self.hidden_size % (4 * self.num_attention_heads):
            rule = (
                f"must be a multiple of 4 x num_attention_heads ({self.num_attention_heads}): "
                "2-D RoPE rotates pairs along x and along y"
            )
            remedy = f"use a multiple of {4 * self.num_attention_heads}, or change the heads"
            found.append(Problem("hidden_size", self.hidden_size, rule, remedy))
        if self.merge_size != 2:
            rule = "must be 2: the chat format counts (h/2)(w/2) tokens per item"
            found.append(Problem("merge_size", self.merge_size, rule, "use 2"))
        if self.side_patch_limit > self.rope_max_grid:
            rule = f"must not exceed rope_max_grid ({self.rope_max_grid})"
            remedy = "lower the limit or raise the grid"
            found.append(Problem("side_patch_limit", self.side_patch_limit, rule, remedy))
        for name in ("image_patch_limit", "frame_patch_limit"):
            limit = getattr(self, name)
            if limit < self.merge_size**2:
                rule = f"must leave room for one merged token ({self.merge_size**2} patches)"
                found.append(Problem(name, limit, rule, f"use {self.merge_size**2} or more"))
        return found


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
    """Where tower and projector are and what of them is trained (`dep.mode` and `optim`)."""

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

    @classmethod
    def without_vision(cls) -> "VisionPlacement":
        """Of a model that has neither part."""
        nothing = frozenset[VisionPart]()
        return cls(encoder_parts=nothing, first_stage_parts=nothing, trained_parts=nothing, feature_width=0)

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
