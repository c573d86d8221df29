"""Attention of a layer over packed documents, and what it records."""

from typing import Any, ClassVar

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from k25_train.model.attention_kernels import HeadSizes, build_attention
from k25_train.model.megatron_config import BackboneConfig
from k25_train.model.packed_documents import PackedDocuments
from k25_train.plan.memory.kernels import AttentionKernel


class RecordingAttention(MegatronModule):
    """Attention that can record the largest logit of every head."""

    takes_latents: ClassVar[bool]
    """Whether it attends to keys and values that it makes from latents itself."""

    def __init__(self, config: BackboneConfig, layer_number: int) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.record_max_logits = False
        self.max_logits: Tensor | None = None
        """The largest q·k·scale of each head since this was last set to None, [H] float32: over the allowed
        pairs of training passes, but for padding. Stays None unless `record_max_logits` is set. Source: K2
        report, section 2.1."""

    @property
    def records(self) -> bool:
        """Whether the pass is one whose largest logits are recorded."""
        return self.record_max_logits and self.training

    def note(self, largest: Tensor) -> None:
        """Record largest logits, [H] float32."""
        before = self.max_logits
        self.max_logits = largest if before is None else torch.maximum(before, largest)


class DocumentAttention(RecordingAttention):
    """Causal attention inside each document; nothing attends across documents."""

    takes_latents = False

    def __init__(
        self,
        config: BackboneConfig,
        layer_number: int,
        *,
        kernel: AttentionKernel,
        softmax_scale: float,
        **_: Any,
    ) -> None:
        super().__init__(config, layer_number)
        self.softmax_scale = softmax_scale
        # Not registered as modules: the kernels have no weights.
        self._kernel = build_attention(
            kernel,
            HeadSizes(
                config.num_attention_heads,
                config.qk_head_dim + config.qk_pos_emb_head_dim,
                config.v_head_dim,
            ),
            softmax_scale,
            layer_number=layer_number,
            max_document_tokens=config.balance_sequence_tokens,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
        """Attend: query and key [T, H, Q], value [T, H, V] -> [T, H * V]."""
        if not self.records:
            return self._kernel.attend(query, key, value, documents.bounds)
        attended, largest = self._kernel.attend_and_measure(query, key, value, documents.bounds)
        if largest is not None:
            self.note(largest)
        return attended
