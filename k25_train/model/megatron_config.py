"""The configuration translated to megatron-core's; no other module does so."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig

from k25_train.config.basics import DType
from k25_train.config.model import ModelConfig
from k25_train.config.training import TrainConfig
from k25_train.errors import ConfigError
from parallel.config import ParallelismConfig
from parallel.dispatcher import Dispatcher
from parallel.pipeline.layout import PipelineLayout

TORCH_DTYPE = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}


@dataclass
class BackboneConfig(MLATransformerConfig):
    """megatron-core's configuration plus what our subclasses of its modules read."""

    balance_sequence_tokens: int = 0
    """Tokens per training sequence, over which the router's balance loss is computed."""
    latent_norm_eps: float = 0.0
    """Epsilon of the norms of the compressed query and key-value."""


def backbone_config(
    model: ModelConfig, train: TrainConfig, sizes: ParallelismConfig, layout: PipelineLayout
) -> BackboneConfig:
    """Translate to megatron-core. The layout's chunks must match `sizes.pp` and `sizes.vpp`.

    Raises `ConfigError` if Transformer Engine is configured but not installed.
    """
    if train.transformer_engine:
        check_transformer_engine()
    config = BackboneConfig(
        **_architecture(model),
        **_router(model),
        **_dispatch(sizes),
        **_fusions(train),
        **_rotary(model),
        **_numerics(train),
        **_pipeline(sizes, layout),
        # megatron-core asserts bfloat16 with the overlap, which works in float32 too: restored below.
        bf16=train.dtype is DType.bfloat16 or sizes.overlap_expert_comm,
        expert_model_parallel_size=sizes.ep,
        context_parallel_size=sizes.cp,
        overlap_moe_expert_parallel_comm=sizes.overlap_expert_comm,
        delay_wgrad_compute=sizes.delay_wgrad,
        balance_sequence_tokens=train.seq_len,
    )
    config.bf16 = train.dtype is DType.bfloat16
    return config


def check_transformer_engine() -> None:
    """Raise `ConfigError` if Transformer Engine cannot be imported."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise ConfigError(
            "train.transformer_engine=true, but transformer_engine cannot be imported: install it "
            "(pip install 'k25-train[gpu]', or take it from the container), or set "
            "train.transformer_engine=false"
        )


def _architecture(model: ModelConfig) -> dict:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "latent_norm_eps": model.latent_norm_eps,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        # The spec brings SwiGLU (`model/swiglu.py`), with and without Transformer Engine.
        "use_te_activation_func": True,
        "bias_activation_fusion": False,
        "ffn_hidden_size": model.dense_ffn_hidden_size,
        "moe_layer_freq": [0] * model.num_dense_layers + [1] * model.num_moe_layers,
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.num_shared_experts * model.expert_ffn_hidden_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _router(model: ModelConfig) -> dict:
    return {
        "moe_router_topk": model.num_experts_per_token,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.expert_bias_update_rate,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.balance_loss_coeff,
        "moe_router_dtype": "fp32",
    }


def _dispatch(sizes: ParallelismConfig) -> dict:
    kind = sizes.dispatcher
    if kind is Dispatcher.alltoall:
        return {"moe_token_dispatcher_type": "alltoall"}
    return {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": kind.value,
        "moe_flex_dispatcher_num_sms": sizes.dispatcher_sms,
        # Of NCCL EP; more rows end the job. megatron-core's own default is None.
        "moe_expert_rank_capacity_factor": sizes.dispatcher_capacity,
    }


def _fusions(train: TrainConfig) -> dict:
    """Kernels of Transformer Engine around the experts, which all sum in float32 and in a fixed order."""
    return {
        "moe_permute_fusion": train.transformer_engine,
        "moe_router_fusion": train.transformer_engine,
        # On the CPU, `startup.determinism` chooses nothing: it computes alike in every run anyway.
        "deterministic_mode": train.deterministic and torch.are_deterministic_algorithms_enabled(),
    }


def _rotary(model: ModelConfig) -> dict:
    rope = model.rope
    return {
        "rope_type": "yarn" if rope.scaling_factor > 1 else "rope",
        "rotary_base": rope.theta,
        "rotary_scaling_factor": rope.scaling_factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "apply_rope_fusion": False,
    }


def _numerics(train: TrainConfig) -> dict:
    dtype = TORCH_DTYPE[train.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Weights are set by name after the build (`model/weights.py`), not by megatron-core's generators.
        "perform_initialization": False,
        # Micro-batches differ in unmasked tokens, so a mean of means would depend on how they are divided; of
        # ranks that share one, each would divide by its own (schedules.py:330; Megatron-LM #7452, #7513).
        "calculate_per_token_loss": True,
    }


def _pipeline(sizes: ParallelismConfig, layout: PipelineLayout) -> dict:
    interleaved = sizes.vpp > 1
    return {
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp if interleaved else None,
        "pipeline_model_parallel_layout": layout.to_megatron() if sizes.pp > 1 else None,
        # With two pipeline ranks, the previous and the next rank are the same, and the batched, untagged
        # sends of the interleaved schedule silently swap activations and gradients (p2p_communication.py,
        # `_batched_p2p_ops`). The unbatched path separates them by group. The plain schedule rejects that
        # path.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Otherwise the host would wait for the whole device after every exchange, and so for features that
        # another rank takes only once this rank has gone on. The torch bug that it works around is fixed.
        "batch_p2p_sync": False,
    }
