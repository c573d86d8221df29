"""The model's configuration: language model and rotary embedding.

Sources: "checkpoint" is the config of the released moonshotai/Kimi-K2.5, "Moonlight" is arXiv 2502.16982,
"K2" the Kimi K2 report (arXiv 2507.20534), "K2.5" the Kimi K2.5 report (arXiv 2602.02276).
"""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import not_negative
from k25_train.config.vision import VisionConfig
from parallel.config import Problem, not_positive

LOSS_PIECE_BYTES = 128 * 2**20
"""Float32 logits for which the loss is computed at a time: little next to the logits of a micro-batch, and
work enough for a GPU. Source: our choice."""
HEAD_PIECE_BYTES = 2**30
"""Logits that the output head makes at a time where `activation.head.logits` is `recompute`, in their own
format: of K2.5's vocabulary 3,276 tokens in bfloat16. Each piece reads the head's weights and their gradient
again, so pieces of a few hundred tokens would be bound by memory. Source: our choice."""

INT4_GROUP = 32
"""Inputs of an expert that share a scale where its weights are INT4. Source: checkpoint,
`quantization_config`."""


class Quantization(Enum):
    """What the weights of routed experts are rounded to in every pass."""

    none = "none"
    """Nothing."""
    int4_qat = "int4_qat"
    """What INT4 stands for, as `k25-convert export --dtype int4` writes it; gradients go straight through to
    the weights that are kept (quantisation-aware training)."""


@dataclass(slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the language model, stretched by YaRN (arXiv 2309.00071)."""

    theta: float
    """Base of the rotation periods. Source: checkpoint, `rope_theta`."""
    scaling_factor: float
    """How many times longer the context is than `original_max_position`; 1.0 is plain RoPE. Source:
    checkpoint, `rope_scaling.factor`."""
    original_max_position: int
    """Context length in tokens before stretching. Source: checkpoint."""
    beta_fast: float
    """Rotations within the original context above which a frequency is kept as it is. Source: checkpoint."""
    beta_slow: float
    """Rotations within the original context below which a frequency is stretched. Source: checkpoint."""
    mscale: float
    """Attention temperature coefficient of the cos and sin tables. Source: checkpoint."""
    mscale_all_dim: float
    """Attention temperature coefficient of the softmax scale. Source: checkpoint."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("theta", "original_max_position", "beta_slow"))
        if self.scaling_factor < 1:
            found.append(
                Problem("scaling_factor", self.scaling_factor, "must be 1.0 (plain RoPE) or more", "use 1.0")
            )
        if self.beta_fast < self.beta_slow:
            rule = f"must not lie below beta_slow ({self.beta_slow})"
            found.append(Problem("beta_fast", self.beta_fast, rule, "the checkpoint has 32 and 1"))
        return found


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The language model (latent or grouped-query attention, mixture of experts) with its vision tower."""

    name: str
    """Name of the model in logs and tables."""
    num_layers: int
    """Transformer layers. Source: checkpoint."""
    num_dense_layers: int
    """Leading layers with a dense MLP instead of experts. Source: checkpoint, `first_k_dense_replace`."""
    hidden_size: int
    """Width of a token's features. Source: checkpoint."""
    num_attention_heads: int
    """Attention heads of a layer. Source: checkpoint."""
    q_lora_rank: int | None
    """Width of the compressed query; null projects queries directly. Source: checkpoint (Moonlight: null)."""
    kv_lora_rank: int | None
    """Width of the compressed key and value; null is grouped-query attention, with a norm of each head's
    queries and keys, as in Qwen3. Source: checkpoint."""
    num_key_value_heads: int | None
    """Heads of keys and values in grouped-query attention; null is latent attention (MLA), in which each head
    of queries has its own. Source: checkpoint."""
    qk_nope_head_dim: int
    """Width of a head's query and key that carries no position. Source: checkpoint."""
    qk_rope_head_dim: int
    """Width of a head's query, and of the key all heads share, that is rotated. Source: checkpoint."""
    v_head_dim: int
    """Width of a head's value. Source: checkpoint."""
    dense_ffn_hidden_size: int
    """Width of a dense layer's SwiGLU. Source: checkpoint, `intermediate_size`."""
    expert_ffn_hidden_size: int
    """Width of one expert's SwiGLU. Source: checkpoint, `moe_intermediate_size`."""
    num_experts: int
    """Routed experts of a layer. Source: checkpoint."""
    num_experts_per_token: int
    """Routed experts that a token is sent to. Source: checkpoint."""
    num_shared_experts: int
    """Experts that every token passes; there may be none. Source: checkpoint."""
    routed_scaling_factor: float
    """Factor on the renormalised weights of a token's experts. Source: checkpoint."""
    balance_loss_coeff: float
    """Weight of the sequence-wise balance loss. Source: checkpoint, `aux_loss_alpha`; reports are silent."""
    expert_bias_update_rate: float
    """Step of the router's expert bias after each global batch. Source: Moonlight, appendix C;
    K2's own value is not disclosed."""
    rms_norm_eps: float
    """Epsilon of every RMSNorm except the latent ones. Source: checkpoint."""
    latent_norm_eps: float
    """Epsilon of the norms of the compressed query and key-value. Source: checkpoint's model code, which
    leaves them at the default, whatever `rms_norm_eps` says; transformers does as well."""
    vocab_size: int
    """Rows of the embedding and of the untied output head. Source: checkpoint."""
    init_std: float
    """Standard deviation of initial weights. Source: checkpoint, `initializer_range`."""
    quantization: Quantization
    """What routed experts compute with. Source: K2.5's post-training has INT4 (K2-Thinking's model card); at
    which stage it begins is not disclosed. Pre-training: none."""
    rope: RopeConfig
    """Rotary position embedding."""
    vision: VisionConfig
    """Vision tower and projector."""

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts: all but the leading dense ones."""
        return self.num_layers - self.num_dense_layers

    def is_moe(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has routed experts instead of a dense MLP."""
        return layer >= self.num_dense_layers

    @property
    def q_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def query_widths(self) -> tuple[int, ...]:
        """Widths of a token's features, its compressed query if there is one, and all heads' queries."""
        widths = self.hidden_size, self.q_lora_rank, self.num_attention_heads * self.q_head_dim
        return tuple(width for width in widths if width is not None)

    @property
    def key_value_widths(self) -> tuple[int, ...]:
        """Widths of a token's features, its compressed key-value if there is one, and all heads' keys and
        values together, without the rotary key that heads share."""
        of_head = self.qk_nope_head_dim + self.v_head_dim
        if self.kv_lora_rank is not None:
            return self.hidden_size, self.kv_lora_rank, self.num_attention_heads * of_head
        assert self.num_key_value_heads is not None, "checked by the rules"
        return self.hidden_size, self.num_key_value_heads * (self.q_head_dim + self.v_head_dim)

    @property
    def has_latent_attention(self) -> bool:
        """Whether keys and values are compressed (MLA), instead of shared by groups of heads."""
        return self.kv_lora_rank is not None

    @property
    def has_vision(self) -> bool:
        """Whether there are a vision tower and a projector."""
        return self.vision.num_layers > 0

    @property
    def compresses_query(self) -> bool:
        """Whether queries are projected in two steps, with a norm between them."""
        return self.q_lora_rank is not None

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken, those of its sub-sections included."""
        sizes = (
            "num_layers hidden_size num_attention_heads "
            "qk_rope_head_dim v_head_dim dense_ffn_hidden_size expert_ffn_hidden_size num_experts "
            "num_experts_per_token routed_scaling_factor rms_norm_eps latent_norm_eps "
            "vocab_size init_std"
        )
        found = not_positive(self, sizes.split())
        may_be_zero = "num_dense_layers num_shared_experts balance_loss_coeff expert_bias_update_rate"
        found += not_negative(self, may_be_zero.split())
        found += self._attention_problems() + self._expert_problems()
        found += [problem.under("rope") for problem in self.rope.problems()]
        return found + [problem.under("vision") for problem in self.vision.problems()]

    def _attention_problems(self) -> list[Problem]:
        found = []
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            rule = "must be positive, or null to project queries directly"
            found.append(Problem("q_lora_rank", self.q_lora_rank, rule, "use null"))
        found += self._latent_problems() if self.has_latent_attention else self._grouped_problems()
        for name in ("qk_nope_head_dim", "qk_rope_head_dim"):
            dim = getattr(self, name)
            if dim % 2:
                rule = "must be even: rotation works on pairs, and attention kernels want even heads"
                found.append(Problem(name, dim, rule, f"use {dim + 1}"))
        if self.v_head_dim > self.q_head_dim:
            rule = (
                f"must not exceed qk_nope_head_dim + qk_rope_head_dim ({self.q_head_dim}), its padded width"
            )
            found.append(Problem("v_head_dim", self.v_head_dim, rule, f"use {self.q_head_dim} or less"))
        return found

    def _latent_problems(self) -> list[Problem]:
        found = not_positive(self, ("kv_lora_rank", "qk_nope_head_dim"))
        if self.num_key_value_heads is not None:
            rule = f"must be null with latent attention (kv_lora_rank {self.kv_lora_rank})"
            found.append(Problem("num_key_value_heads", self.num_key_value_heads, rule, "use null"))
        return found

    def _grouped_problems(self) -> list[Problem]:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        found = not_negative(self, ("qk_nope_head_dim",))
        if groups is None or groups <= 0 or heads % groups:
            rule = f"must divide num_attention_heads ({heads}) where kv_lora_rank is null"
            remedy = f"use e.g. {heads}, or give kv_lora_rank"
            found.append(Problem("num_key_value_heads", groups, rule, remedy))
        if self.q_lora_rank is not None:
            rule = "must be null where kv_lora_rank is"
            found.append(Problem("q_lora_rank", self.q_lora_rank, rule, "use null, or give kv_lora_rank"))
        if self.v_head_dim != self.q_head_dim:
            rule = (
                f"must be qk_nope_head_dim + qk_rope_head_dim ({self.q_head_dim}) where kv_lora_rank is null"
            )
            found.append(Problem("v_head_dim", self.v_head_dim, rule, f"use {self.q_head_dim}"))
        return found

    def _expert_problems(self) -> list[Problem]:
        found = []
        for name in ("hidden_size", "expert_ffn_hidden_size"):
            size = getattr(self, name)
            if size % 8:
                rule = "must be a multiple of 8: grouped expert products need rows of whole 16 bytes in bf16"
                found.append(Problem(name, size, rule, f"use {size - size % 8 + 8}"))
            elif size % INT4_GROUP and self.quantization is Quantization.int4_qat:
                rule = f"must be a multiple of {INT4_GROUP} with int4_qat: so many inputs share a scale"
                remedy = f"use {size - size % INT4_GROUP + INT4_GROUP}, or quantization=none"
                found.append(Problem(name, size, rule, remedy))
        if self.quantization is Quantization.int4_qat and not self.num_moe_layers > 0:
            rule = "rounds routed experts, of which there are none: every layer is dense"
            found.append(Problem("quantization", self.quantization.value, rule, "use none"))
        if self.num_experts_per_token > self.num_experts:
            rule = f"must not exceed num_experts ({self.num_experts})"
            remedy = "send a token to fewer experts"
            found.append(Problem("num_experts_per_token", self.num_experts_per_token, rule, remedy))
        if self.num_dense_layers > self.num_layers:
            rule = f"must not exceed num_layers ({self.num_layers})"
            found.append(Problem("num_dense_layers", self.num_dense_layers, rule, "make fewer layers dense"))
        return found
