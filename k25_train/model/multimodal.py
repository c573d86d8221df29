"""The multimodal model: vision features take the places of media placeholders among the token embeddings.

Features come from tower and projector: of the first chunk itself, which then takes pixels (the coupled
tower), or of all ranks' replicas (`VisionEncoder`), in which case the first chunk is given the features. A
projector that is trained behind a frozen tower stays in the first chunk in any case.

Shapes: P patches, V vision tokens, M = merge_size²·C the width of the tower's merged patches, D the language
model's.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from k25_train.model.attention import PackedDocuments
from k25_train.model.megatron_config import BackboneConfig
from k25_train.model.moonvit import ItemPart, Layer, MoonViT3D, chain
from k25_train.model.projector import PatchMergerProjector
from parallel.activations.annotate import saves

GridTHW = tuple[int, int, int]


class VisionEncoder(MegatronModule):
    """The tower and, unless the first chunk has it, the projector, with their names in the whole model."""

    def __init__(
        self,
        config: BackboneConfig,
        vision_tower: MoonViT3D,
        mm_projector: PatchMergerProjector | None,
    ) -> None:
        super().__init__(config)
        self.vision_tower = vision_tower
        self.mm_projector = mm_projector

    def forward(self, pixels: Tensor, grid_thw: Sequence[GridTHW], part: ItemPart | None = None) -> Tensor:
        """Encode items, or a part of one: pixels [P, 588] -> features [V, D], or [V, M] without a projector.

        V may be 0.
        """
        return self._project(self.vision_tower(pixels, grid_thw, part))

    def layers(self, pixels: Tensor, grid_thw: Sequence[GridTHW]) -> list[Layer]:
        """What `forward` does in steps of about equal length, one a layer of the tower."""
        layers = self.vision_tower.layers(pixels, grid_thw)
        layers[-1] = chain(layers[-1], self._project)
        return layers

    def _project(self, merged: Tensor) -> Tensor:
        return merged.flatten(1) if self.mm_projector is None else self.mm_projector(merged)


class MultimodalModel(MegatronModule):
    """One pipeline chunk of the model: its decoder layers and, in the first chunk, a coupled tower with its
    projector, or a projector alone."""

    def __init__(
        self,
        config: BackboneConfig,
        language_model: GPTModel,
        vision_tower: nn.Module | None = None,
        mm_projector: PatchMergerProjector | None = None,
    ) -> None:
        super().__init__(config)
        # In the order of the forward pass: by it, gradients are reduced and updated parameters gathered.
        self.vision_tower = vision_tower
        self.mm_projector = mm_projector
        self.language_model = language_model
        # Read by megatron-core's pipeline schedules.
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.model_type = language_model.model_type
        self.share_embeddings_and_output_weights = False

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the activations [T, 1, D] of the chunk before; called by the pipeline schedule."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens: Tensor,
        documents: PackedDocuments,
        labels: Tensor | None = None,
        media_positions: Tensor | None = None,
        pixels: Tensor | None = None,
        grid_thw: Sequence[GridTHW] = (),
        features: Tensor | None = None,
    ) -> Tensor:
        """Run the chunk on one micro-batch of T packed tokens.

        Args:
            tokens: [T] int64 token ids.
            documents: where documents begin and end.
            labels: [T] int64; with them the last chunk returns losses instead of logits.
            media_positions: [V] int64, where the placeholders of vision features stand (first chunk only).
            pixels: [P, 3*14*14] patches of all items, one after another (first chunk, coupled tower).
            grid_thw: (frames, rows, columns) in patches of every item, in placeholder order.
            features: [V, D] of all items, encoded elsewhere (first chunk, decoupled tower); [V, M] for a
                chunk that has a projector, but no tower.

        Returns activations [T, 1, D]; from the last chunk losses [T] float32, or logits [T, vocabulary].
        Raises ValueError if the features do not fill the placeholders exactly.
        """
        inputs = self._language_model_inputs(
            tokens, documents, labels, media_positions, self._features(pixels, grid_thw, features)
        )
        output = self.language_model(**inputs)
        return output.squeeze(0) if self.post_process else output

    def build_schedule_plan(
        self,
        tokens: Tensor,
        documents: PackedDocuments,
        labels: Tensor,
        media_positions: Tensor | None = None,
        pixels: Tensor | None = None,
        grid_thw: Sequence[GridTHW] = (),
        features: Tensor | None = None,
    ) -> AbstractSchedulePlan:
        """The pass that `forward` makes, in pieces that megatron-core's overlapped schedule runs by itself.

        Embeddings and vision features are computed at once; losses come out as [1, T].
        """
        inputs = self._language_model_inputs(
            tokens, documents, labels, media_positions, self._features(pixels, grid_thw, features)
        )
        return self.language_model.build_schedule_plan(**inputs)

    def _features(
        self, pixels: Tensor | None, grid_thw: Sequence[GridTHW], features: Tensor | None
    ) -> Tensor | None:
        """What takes the places of the placeholders, [V, D]."""
        if self.mm_projector is None:
            return features
        with saves("vision.encoder"):
            if self.vision_tower is None:
                return self.mm_projector.of_flat(features)
            return features if pixels is None else self.encode(pixels, grid_thw)

    def encode(self, pixels: Tensor, grid_thw: Sequence[GridTHW]) -> Tensor:
        """What `VisionEncoder` does, by a coupled tower."""
        assert self.vision_tower is not None and self.mm_projector is not None, "it is decoupled"
        return self.mm_projector(self.vision_tower(pixels, grid_thw))

    def _language_model_inputs(
        self,
        tokens: Tensor,
        documents: PackedDocuments,
        labels: Tensor | None,
        media_positions: Tensor | None,
        features: Tensor | None,
    ) -> dict[str, Any]:
        embeddings = None
        if self.pre_process:
            embeddings = self.language_model.embedding(tokens.unsqueeze(0), position_ids=None)
            if features is not None and media_positions is not None:
                embeddings = put_features(embeddings, features, media_positions)
        return {
            "input_ids": tokens.unsqueeze(0),
            "position_ids": None,
            "attention_mask": None,
            "decoder_input": embeddings,
            "labels": None if labels is None else labels.unsqueeze(0),
            "packed_seq_params": documents,
        }


def put_features(embeddings: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Replace rows of `embeddings` [T, 1, D] at `positions` [V] by `features` [V, D]."""
    if features.shape[0] != positions.shape[0]:
        raise ValueError(
            f"{features.shape[0]} vision features for {positions.shape[0]} media placeholders: each item "
            "needs (h/2)(w/2) placeholders, whatever its number of frames"
        )
    # index_copy would save the features for its backward pass, which reads no more than their shape.
    return embeddings.index_put((positions,), features.unsqueeze(1).to(embeddings.dtype))
