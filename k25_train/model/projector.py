"""The patch-merger projector between the vision tower and the language model (K2.5 report, section 4.1)."""

from __future__ import annotations

from torch import Tensor, nn

from k25_train.config.vision import VisionConfig


class PatchMergerProjector(nn.Module):
    """Normalise each patch, concatenate the patches of a token, and map them to one text embedding.

    Parameter names are those of the released checkpoint's `mm_projector.`.
    """

    def __init__(self, vision: VisionConfig, text_hidden_size: int) -> None:
        super().__init__()
        self._merged_size = merged_size = vision.merged_size
        self.pre_norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.proj = nn.Sequential(
            nn.Linear(merged_size, merged_size),
            nn.GELU(),
            nn.Linear(merged_size, text_hidden_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[V, merge_size², C] tower features -> [V, text_hidden_size] embeddings; V may be zero."""
        return self.proj(self.pre_norm(features).flatten(1))

    def of_flat(self, features: Tensor | None) -> Tensor:
        """[V, merge_size²·C] tower features, flat as other ranks send them -> [V, text_hidden_size].

        None means no features: [0, text_hidden_size], through which parameters still get a gradient, of
        zeros. Reductions that overlap with the backward pass wait for a gradient of every parameter.
        """
        norm = self.pre_norm
        if features is None:
            features = norm.weight.new_empty(0, self._merged_size)
        return self(features.unflatten(1, (-1, norm.normalized_shape[0])))
