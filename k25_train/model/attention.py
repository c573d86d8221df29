"""Multi-head latent attention over packed documents.

`PackedLatentAttention` projects to queries, keys and values and applies rotary positions that restart with
every document. Its core attends inside each document: `DocumentAttention` to the keys and values, with one of
`attention_kernels.py`; `SharedDocumentAttention`, where ranks share micro-batches, to those that it makes
from all ranks' latents.

Shapes: T tokens of a micro-batch (all documents one after another), D hidden, H heads, Q query/key head size
(nope + rope), R rope part of it, V value head size.
"""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor, nn

from k25_train.model.megatron_config import BackboneConfig
from k25_train.model.packed_documents import PackedDocuments
from parallel.activations.annotate import named, recomputed


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of neighbours in `x` [T, heads, R] by `rotations` [T, 1, R/2] complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def _latents(kv_compressed: Tensor, k_rope: Tensor, rotations: Tensor) -> Tensor:
    """What keys and values are made from: the normed compressed key-value and the rotary key, [T, C]."""
    return torch.cat((kv_compressed, rotate(k_rope.unsqueeze(1), rotations).squeeze(1)), dim=-1)


class PackedLatentAttention(MLASelfAttention):
    """MLA (K2 report, table 2) for packed documents.

    Upstream applies rotary embeddings document by document, which launches a handful of kernels per document
    and layer, and reads the lengths back from the device each time; here one table serves all layers.
    """

    def __init__(
        self, config: BackboneConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        # Ranks that share micro-batches are the core's business: upstream would give each a part of the table
        # of rotations, by cutting sequences evenly.
        groups = copy.copy(pg_collection)
        groups.cp = groups.tp
        super().__init__(config, *args, pg_collection=groups, **kwargs)
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
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Project `hidden_states` [T, 1, D] to query [T, H, Q], key [T, H, Q] and value [T, H, V]; for a core
        that takes latents, to query, latents [T, C] and None.

        Also returns what they are projected from, the compressed query and key-value, as the base class does.
        """
        if not isinstance(packed_seq_params, PackedDocuments):
            raise TypeError(
                "PackedLatentAttention needs packed_seq_params=PackedDocuments.of(lengths, device)"
            )
        # 1. Compress. The latents are what is kept for the backward pass.
        config, takes_latents = self.config, self.core_attention.takes_latents
        if takes_latents and torch.is_grad_enabled() and not hidden_states.requires_grad:
            # Ranks that share a micro-batch go backward together, also where one of them alone has the image
            # whose tower is all that is trained before this layer.
            hidden_states = hidden_states.detach().requires_grad_()
        rotations = self._rotations(packed_seq_params)
        q_compressed, kv_combined = self._qkv_down_projection(hidden_states.squeeze(1))
        named("mla.latent", kv_combined)
        kv_compressed, k_rope = kv_combined.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        q_compressed = self._normed_query(q_compressed)
        kv_compressed = self.kv_layernorm(kv_compressed)

        # 2. Expand into heads; the backward pass may do it again.
        if takes_latents:
            query = recomputed("mla.up_proj", self._queries, q_compressed, rotations)
            latents = recomputed("mla.up_input", _latents, kv_compressed, k_rope, rotations)
            return query, latents, None, q_compressed, kv_compressed
        query, key, value = recomputed(
            "mla.up_proj", self._up_projection, q_compressed, kv_compressed, k_rope, rotations
        )
        return query, key, value, q_compressed, kv_compressed

    def _up_projection(
        self, q_compressed: Tensor, kv_compressed: Tensor, k_rope: Tensor, rotations: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [T, H, Q] and value [T, H, V] from the normed latents and the rotary key [T, R]."""
        config, num_heads = self.config, self.num_attention_heads_per_partition
        q_THQ = self._queries(q_compressed, rotations)
        key_value, _ = self.linear_kv_up_proj(kv_compressed)
        key_value = key_value.unflatten(-1, (num_heads, config.qk_head_dim + config.v_head_dim))
        k_nope, v_THV = key_value.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        # All heads share one rotary key.
        k_THR = rotate(k_rope.unsqueeze(1), rotations).expand(-1, num_heads, -1)
        k_THQ = torch.cat((k_nope, k_THR), dim=-1)
        # As a view, the saved values would keep the memory of the keys next to them.
        return q_THQ, k_THQ, v_THV.contiguous()

    def _queries(self, q_compressed: Tensor, rotations: Tensor) -> Tensor:
        """Query [T, H, Q] from its normed latent."""
        config = self.config
        query, _ = self.query_projection(q_compressed)
        q_THQ = query.unflatten(-1, (self.num_attention_heads_per_partition, self.q_head_dim))
        q_nope, q_rope = q_THQ.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat((q_nope, rotate(q_rope, rotations)), dim=-1)

    def _rotations(self, documents: PackedDocuments) -> Tensor:
        """Rotations [T, 1, R/2] complex64, computed once per micro-batch."""
        if documents.rotations is None:
            # Upstream keeps 32 tables: one for all micro-batches, of 64 MB at 262,144 tokens, is enough.
            num_positions = max(documents.max_seqlen_q, self.config.balance_sequence_tokens)
            frequencies = self.rotary_pos_emb(num_positions, packed_seq=True)
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
        value: Tensor | None,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        attn_mask_type: Any = None,
        **_: Any,
    ) -> Tensor:
        if value is None:
            attend = partial(self.core_attention, query, key, packed_seq_params)
            return self.linear_kv_up_proj(attend)
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
