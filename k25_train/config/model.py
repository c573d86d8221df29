"""The model's configuration: language model, rotary embedding, vision tower and projector.

Sources: "checkpoint" is the config of the released moonshotai/Kimi-K2.5, "Moonlight" is arXiv 2502.16982,
"K2" the Kimi K2 report (arXiv 2507.20534), "K2.5" the Kimi K2.5 report (arXiv 2602.02276).
"""

from dataclasses import dataclass

from k25_train.config.basics import not_negative
from parallel.config import Problem, not_positive

LOSS_PIECE_BYTES = 128 * 2**20
"""Float32 logits for which the loss is computed at a time: little next to the logits of a micro-batch, and
work enough for a GPU. Source: our choice."""


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
class VisionConfig:
    """MoonViT-3D, its preprocessing limits, and the projector's 2x2 merge."""

    patch_size: int
    """Edge of a square patch in pixels. Source: checkpoint."""
    num_layers: int
    """Transformer blocks. Source: checkpoint."""
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
            "patch_size num_layers hidden_size ffn_hidden_size num_attention_heads pos_emb_height "
            "pos_emb_width pos_emb_time merge_size rope_theta rope_max_grid layer_norm_eps "
            "image_patch_limit side_patch_limit frame_patch_limit video_fps"
        )
        found = not_positive(self, sizes.split())
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


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The language model (MLA attention, mixture of experts) with its vision tower."""

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
    kv_lora_rank: int
    """Width of the compressed key and value. Source: checkpoint."""
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
    """Experts that every token passes. Source: checkpoint."""
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
    def compresses_query(self) -> bool:
        """Whether queries are projected in two steps, with a norm between them."""
        return self.q_lora_rank is not None

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken, those of its sub-sections included."""
        sizes = (
            "num_layers hidden_size num_attention_heads kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim dense_ffn_hidden_size expert_ffn_hidden_size num_experts "
            "num_experts_per_token num_shared_experts routed_scaling_factor rms_norm_eps latent_norm_eps "
            "vocab_size init_std"
        )
        found = not_positive(self, sizes.split())
        found += not_negative(self, ("num_dense_layers", "balance_loss_coeff", "expert_bias_update_rate"))
        found += self._attention_problems() + self._expert_problems()
        found += [problem.under("rope") for problem in self.rope.problems()]
        return found + [problem.under("vision") for problem in self.vision.problems()]

    def _attention_problems(self) -> list[Problem]:
        found = []
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            rule = "must be positive, or null to project queries directly"
            found.append(Problem("q_lora_rank", self.q_lora_rank, rule, "use null"))
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

    def _expert_problems(self) -> list[Problem]:
        found = []
        for name in ("hidden_size", "expert_ffn_hidden_size"):
            size = getattr(self, name)
            if size % 8:
                rule = "must be a multiple of 8: grouped expert products need rows of whole 16 bytes in bf16"
                found.append(Problem(name, size, rule, f"use {size - size % 8 + 8}"))
        if self.num_experts_per_token > self.num_experts:
            rule = f"must not exceed num_experts ({self.num_experts})"
            remedy = "send a token to fewer experts"
            found.append(Problem("num_experts_per_token", self.num_experts_per_token, rule, remedy))
        if self.num_dense_layers > self.num_layers:
            rule = f"must not exceed num_layers ({self.num_layers})"
            found.append(Problem("num_dense_layers", self.num_dense_layers, rule, "make fewer layers dense"))
        return found
