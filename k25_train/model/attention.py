"""Multi-head latent attention over packed documents.

Two subclasses of megatron-core's modules. `PackedLatentAttention` projects to queries, keys and values and
applies rotary positions that restart with every document; `DocumentAttention` attends inside each document
with one of `attention_kernels.py` and can record the largest logit of every head.

Shapes: T tokens of a micro-batch (all documents one after another), D hidden, H heads, Q query/key head size
(nope + rope), R rope part of it, V value head size.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor, nn

from k25_train.model.attention_kernels import HeadSizes, build_attention
from k25_train.model.megatron_config import BackboneConfig
from k25_train.model.packed_documents import PackedDocuments
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.activations.annotate import named, recomputed


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of neighbours in `x` [T, heads, R] by `rotations` [T, 1, R/2] complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


class PackedLatentAttention(MLASelfAttention):
    """MLA (K2 report, table 2) for packed documents.

    Upstream applies rotary embeddings document by document, which launches a handful of kernels per document
    and layer, and reads the lengths back from the device each time; here one table serves all layers.
    """

    def __init__(self, config: BackboneConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for norm in self._latent_norms():
            norm.eps = config.latent_norm_eps

    @property
    def query_projection(self) -> nn.Module:
        """The linear layer whose rows are the queries of the heads."""
        return self.linear_q_up_proj

    def _latent_norms(self) -> tuple[Any, ...]:
        return self.q_layernorm, self.kv_layernorm

    def _normed_query(self, q_compressed: Tensor) -> Tensor:
        """What `query_projection` reads."""
        return self.q_layernorm(q_compressed)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Project `hidden_states` [T, 1, D] to query [T, H, Q], key [T, H, Q] and value [T, H, V].

        Also returns what they are projected from, the compressed query and key-value, as the base class does.
        """
        if not isinstance(packed_seq_params, PackedDocuments):
            raise TypeError(
                "PackedLatentAttention needs packed_seq_params=PackedDocuments.of(lengths, device)"
            )
        # 1. Compress. The latents are what is kept for the backward pass.
        config = self.config
        rotations = self._rotations(packed_seq_params)
        q_compressed, kv_combined = self._qkv_down_projection(hidden_states.squeeze(1))
        named("mla.latent", kv_combined)
        kv_compressed, k_rope = kv_combined.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        q_compressed = self._normed_query(q_compressed)
        kv_compressed = self.kv_layernorm(kv_compressed)

        # 2. Expand into heads; the backward pass may do it again.
        query, key, value = recomputed(
            "mla.up_proj", self._up_projection, q_compressed, kv_compressed, k_rope, rotations
        )
        return query, key, value, q_compressed, kv_compressed

    def _up_projection(
        self, q_compressed: Tensor, kv_compressed: Tensor, k_rope: Tensor, rotations: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [T, H, Q] and value [T, H, V] from the normed latents and the rotary key [T, R]."""
        config, num_heads = self.config, self.num_attention_heads_per_partition
        # 1. Up-projections, split into heads.
        query, _ = self.query_projection(q_compressed)
        q_THQ = query.unflatten(-1, (num_heads, self.q_head_dim))
        q_nope, q_rope = q_THQ.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        key_value, _ = self.linear_kv_up_proj(kv_compressed)
        key_value = key_value.unflatten(-1, (num_heads, config.qk_head_dim + config.v_head_dim))
        k_nope, v_THV = key_value.split([config.qk_head_dim, config.v_head_dim], dim=-1)

        # 2. Rotary positions. All heads share one rotary key.
        k_THR = rotate(k_rope.unsqueeze(1), rotations).expand(-1, num_heads, -1)
        q_THQ = torch.cat((q_nope, rotate(q_rope, rotations)), dim=-1)
        k_THQ = torch.cat((k_nope, k_THR), dim=-1)
        # As a view, the saved values would keep the memory of the keys next to them.
        return q_THQ, k_THQ, v_THV.contiguous()

    def _rotations(self, documents: PackedDocuments) -> Tensor:
        """Rotations [T, 1, R/2] complex64, computed once per micro-batch."""
        if documents.rotations is None:
            frequencies = self.rotary_pos_emb(documents.max_seqlen_q, packed_seq=True)
            scale = 1.0
            if isinstance(frequencies, tuple):
                frequencies, scale = frequencies
            # Upstream lists every angle twice, once for each member of a pair.
            angles = frequencies[:, 0, :, : frequencies.shape[-1] // 2][documents.positions]
            documents.rotations = torch.polar(torch.full_like(angles, scale), angles)
        return named("mla.rotations", documents.rotations)

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        attn_mask_type: Any = None,
        **_: Any,
    ) -> Tensor:
        # The base class pads values to the query's head size, whether the kernel needs it or not.
        return self.core_attention(query, key, value, packed_seq_params)


class DirectQueryAttention(PackedLatentAttention):
    """The same with queries that are projected from the features in one step (`model.q_lora_rank=null`)."""

    @property
    def query_projection(self) -> nn.Module:
        """The linear layer whose rows are the queries of the heads."""
        return self.linear_q_proj

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        # With Transformer Engine, upstream would fuse a norm into this projection, whose input is normed
        # already; without it, upstream fails. The release has no such norm.
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _latent_norms(self) -> tuple[Any, ...]:
        return (self.kv_layernorm,)

    def _normed_query(self, q_compressed: Tensor) -> Tensor:
        # Upstream hands on the features, which the layer's own norm has normed.
        return q_compressed


class DocumentAttention(MegatronModule):
    """Causal attention inside each document; nothing attends across documents."""

    def __init__(
        self,
        config: BackboneConfig,
        layer_number: int,
        *,
        kernel: AttentionKernel,
        softmax_scale: float,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
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
        self.record_max_logits = False
        self.max_logits: Tensor | None = None
        """The largest q·k·scale of each head since this was last set to None, [H] float32: over the allowed
        pairs of training passes, but for padding. Stays None unless `record_max_logits` is set. Source: K2
        report, section 2.1."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
        """Attend: query and key [T, H, Q], value [T, H, V] -> [T, H * V]."""
        if not (self.record_max_logits and self.training):
            return self._kernel.attend(query, key, value, documents.bounds)
        attended, largest = self._kernel.attend_and_measure(query, key, value, documents.bounds)
        if largest is not None:
            before = self.max_logits
            self.max_logits = largest if before is None else torch.maximum(before, largest)
        return attended
