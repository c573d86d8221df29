"""The multimodal model: vision features replace the embeddings of media placeholders among the tokens.

Features are made by tower and projector: those of the first chunk itself, which then takes pixels (the
coupled tower), or the replicas on all ranks (`VisionEncoder`), in which case the first chunk is given the
features. A projector that is trained behind a frozen tower is in the first chunk in any case.

Shapes: T tokens, P patches, X values of a patch, V vision tokens, S = merge_size² patches of one, C tower
width, M = S·C, D hidden size of the language model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from k25_train.model.megatron_config import BackboneConfig
from k25_train.model.moonvit import MoonViT3D, chain
from k25_train.model.moonvit_blocks import Layer
from k25_train.model.moonvit_items import Grid, ItemPart
from k25_train.model.packed_documents import PackedDocuments
from k25_train.model.projector import PatchMergerProjector
from parallel.activations.annotate import saves


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

    def forward(self, pixels: Tensor, grid_thw: Sequence[Grid], part: ItemPart | None = None) -> Tensor:
        """Encode items, or a part of one: pixels [P, X] -> features [V, D], or [V, M] without a projector.

        V may be 0.
        """
        return self._project(self.vision_tower(pixels, grid_thw, part))

    def layers(self, pixels: Tensor, grid_thw: Sequence[Grid]) -> list[Layer]:
        """What `forward` does, in steps of about equal duration: one per layer of the tower."""
        layers = self.vision_tower.layers(pixels, grid_thw)
        layers[-1] = chain(layers[-1], self._project)
        return layers

    def _project(self, merged_VSC: Tensor) -> Tensor:
        """[V, S, C] -> [V, D], or [V, M] without a projector."""
        return merged_VSC.flatten(1) if self.mm_projector is None else self.mm_projector(merged_VSC)


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
        # In the order of the forward pass: gradients are reduced and updated parameters gathered by it.
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
        grid_thw: Sequence[Grid] = (),
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
    ) -> Tensor:
        """Run the chunk on one micro-batch of T packed tokens, or on the T of it that this rank holds.

        Args:
            tokens: [T] int64 token ids.
            documents: where documents begin and end.
            labels: [T] int64; with them the last chunk returns losses instead of logits.
            media_positions: [V] int64, indices of the placeholders of vision features (first chunk only).
            pixels: [P, X] patches of all items, one after another (first chunk, coupled tower).
            grid_thw: (frames, rows, columns) in patches of every item, in placeholder order.
            features: [V, D] of the placeholders, encoded elsewhere (first chunk, decoupled tower); [V, M] for
                a chunk that has a projector, but no tower.
            feature_rows: [V] int64, the rows that the placeholders take of the features that a coupled tower
                makes of `pixels`; None if all of them, in order.

        Returns activations [T, 1, D]; from the last chunk losses [T] float32, or logits [T, vocabulary].
        Raises ValueError if the features do not fill the placeholders exactly.
        """
        inputs = self._language_model_inputs(
            tokens,
            documents,
            labels,
            media_positions,
            self._features(pixels, grid_thw, features, feature_rows),
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
        grid_thw: Sequence[Grid] = (),
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
    ) -> AbstractSchedulePlan:
        """The pass of `forward`, in pieces that megatron-core's overlapped schedule runs by itself.

        Embeddings and vision features are computed immediately; losses are returned as [1, T].
        """
        inputs = self._language_model_inputs(
            tokens,
            documents,
            labels,
            media_positions,
            self._features(pixels, grid_thw, features, feature_rows),
        )
        return self.language_model.build_schedule_plan(**inputs)

    def _features(
        self,
        pixels: Tensor | None,
        grid_thw: Sequence[Grid],
        features: Tensor | None,
        feature_rows: Tensor | None,
    ) -> Tensor | None:
        """What replaces the embeddings of the placeholders, [V, D]."""
        if self.mm_projector is None:
            return features
        with saves("vision.encoder"):
            if self.vision_tower is None:
                return self.mm_projector.of_flat(features)
            if pixels is None:
                return features
            encoded = self.encode(pixels, grid_thw)
            # Of an item that is cut, other ranks take the rest.
            return encoded if feature_rows is None else encoded.index_select(0, feature_rows)

    def encode(self, pixels: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        """What `VisionEncoder` does, with a coupled tower: pixels [P, X] -> features [V, D]."""
        assert self.vision_tower is not None and self.mm_projector is not None, "the tower is decoupled"
        return self.mm_projector(self.vision_tower(pixels, grid_thw))

    def _language_model_inputs(
        self,
        tokens: Tensor,
        documents: PackedDocuments,
        labels: Tensor | None,
        media_positions: Tensor | None,
        features: Tensor | None,
    ) -> dict[str, Any]:
        """Arguments of `GPTModel.forward`; the first chunk embeds tokens and vision features here."""
        embeddings_T1D = None
        if self.pre_process:
            embeddings_T1D = self.language_model.embedding(tokens.unsqueeze(0), position_ids=None)
            if features is not None and media_positions is not None:
                embeddings_T1D = put_features(embeddings_T1D, features, media_positions)
            if torch.is_grad_enabled() and not embeddings_T1D.requires_grad:
                # The pipeline goes backward through every micro-batch: through a language model that is not
                # trained and has no features to hand gradients to as well.
                embeddings_T1D.requires_grad_()
        return {
            "input_ids": tokens.unsqueeze(0),
            "position_ids": None,
            "attention_mask": None,
            "decoder_input": embeddings_T1D,
            "labels": None if labels is None else labels.unsqueeze(0),
            "packed_seq_params": documents,
        }


def put_features(embeddings_T1D: Tensor, features_VD: Tensor, positions_V: Tensor) -> Tensor:
    """Replace the embeddings at `positions_V` by features; [T, 1, D]."""
    if features_VD.shape[0] != positions_V.shape[0]:
        raise ValueError(
            f"{features_VD.shape[0]} vision features for {positions_V.shape[0]} media placeholders: each "
            "item needs (h/2)(w/2) placeholders, whatever its number of frames"
        )
    # index_copy would save the features for its backward pass, which reads only their shape.
    return embeddings_T1D.index_put((positions_V,), features_VD.unsqueeze(1).to(embeddings_T1D.dtype))
