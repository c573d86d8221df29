"""The language model: megatron-core's GPTModel, assembled from a spec of its modules and ours."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from k25_train.config.model import ModelConfig
from k25_train.model.attention import DirectQueryAttention, PackedLatentAttention
from k25_train.model.context_attention import SharedDocumentAttention, lend_weight
from k25_train.model.document_attention import DocumentAttention
from k25_train.model.experts import GroupedExperts
from k25_train.model.grouped_gemm import grouped_gemm
from k25_train.model.head import add_losses_by_pieces, goes_by_pieces
from k25_train.model.layer import DocumentExperts, DocumentLayer
from k25_train.model.megatron_config import BackboneConfig, check_transformer_engine
from k25_train.model.router import SequenceBalancedRouter
from k25_train.model.swiglu import SwiGLU
from k25_train.model.token_losses import token_losses
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.activations.annotate import named, recomputed, saves
from parallel.context.exchange import NOT_SHARED, LatentExchange
from parallel.megatron.wgrad import accumulate_in_main_grad


def linear_backend(*, transformer_engine: bool) -> BackendSpecProvider:
    """Which linear layers and norms to build with: Transformer Engine's, or megatron-core's own.

    Raises `ConfigError` if Transformer Engine is configured but not installed.
    """
    if not transformer_engine:
        return LocalSpecProvider()
    check_transformer_engine()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def layer_norm(backend: BackendSpecProvider) -> Callable[..., nn.Module]:
    """A builder of the norms of the residual stream."""
    return saved_norm(backend.layer_norm(rms_norm=True), "norm.input", "norm.output")


def saved_norm(build: Callable[..., nn.Module], inputs: str, outputs: str) -> Callable[..., nn.Module]:
    """A builder of norms whose inputs and outputs are saved under these names."""

    def build_saved(*args: Any, **kwargs: Any) -> nn.Module:
        norm = build(*args, **kwargs)
        run = norm.forward
        norm.forward = lambda hidden: recomputed(outputs, run, named(inputs, hidden))
        return norm

    return build_saved


def attention_spec(
    backend: BackendSpecProvider, kernel: AttentionKernel, exchange: LatentExchange, *, compresses_query: bool
) -> ModuleSpec:
    """Multi-head latent attention, with queries compressed as keys and values are, or projected directly."""
    # 1. The query.
    column = backend.column_parallel_linear()
    norm = saved_norm(backend.layer_norm(rms_norm=True, for_qk=True), "mla.latent", "mla.up_input")
    module: type[PackedLatentAttention] = PackedLatentAttention
    query: dict[str, Any] = {"linear_q_down_proj": column, "q_layernorm": norm, "linear_q_up_proj": column}
    if not compresses_query:
        module, query = DirectQueryAttention, {"linear_q_proj": column, "q_layernorm": IdentityOp}
    # 2. The rest.
    core = ModuleSpec(module=DocumentAttention, params={"kernel": kernel})
    if exchange.num_ranks > 1:
        core = ModuleSpec(module=SharedDocumentAttention, params={"kernel": kernel, "exchange": exchange})
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            **query,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=core,
            linear_proj=backend.row_parallel_linear(),
            kv_layernorm=norm,
        ),
    )


def layer_spec(
    backend: BackendSpecProvider,
    attention: ModuleSpec,
    experts: Callable[..., GroupedExperts],
    *,
    is_moe: bool,
) -> ModuleSpec:
    """One decoder layer: pre-norm attention, then a dense SwiGLU or the mixture of experts."""
    # 1. Linear layers and norms of the backend.
    norm = layer_norm(backend)
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()

    def mlp(part: str) -> MLPSubmodules:
        return MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=partial(SwiGLU, part))

    # 2. Our router and experts in megatron-core's layer.
    moe = MoESubmodules(
        router=SequenceBalancedRouter,
        experts=experts,
        shared_experts=partial(SharedExpertMLP, submodules=mlp("shared_expert")),
    )
    return ModuleSpec(
        module=DocumentLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=partial(DocumentExperts, submodules=moe)
            if is_moe
            else partial(MLP.as_mlp_submodule, submodules=mlp("dense")),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class LanguageModel(GPTModel):
    """megatron-core's GPTModel with a cross entropy that takes little memory, and none of it for logits where
    head and loss go by pieces.

    Upstream's loss is split over tensor-parallel ranks, which this project does not have.
    """

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [B, S] float32 of logits [S, B, vocabulary] against labels [B, S]."""
        with saves("head.logits"):
            losses = token_losses(logits.flatten(0, 1), labels.T.flatten())
        return losses.view(logits.shape[:2]).T

    def _postprocess(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits, or losses; called in a whole pass and by a node of the overlapped schedule."""
        if kwargs["labels"] is not None and goes_by_pieces():
            kwargs["output_processor"] = _losses_by_pieces
        return super()._postprocess(*args, **kwargs)


def _losses_by_pieces(*, hidden_states: Tensor, output_layer: nn.Module, labels: Tensor, **_: Any) -> Tensor:
    """Losses [B, S] float32 of features [S, B, D] against labels [B, S], without their logits."""
    with saves("head.logits"):
        losses = output_layer(hidden_states.flatten(0, 1), labels=labels.T.flatten())
    return losses.view(hidden_states.shape[:2]).T


def build_language_model(
    model: ModelConfig,
    config: BackboneConfig,
    groups: ProcessGroupCollection,
    layer_ids: range,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    transformer_engine: bool = False,
    attention: AttentionKernel = AttentionKernel.cpu,
    exchange: LatentExchange = NOT_SHARED,
) -> LanguageModel:
    """Build the part of the language model that holds the decoder layers `layer_ids`.

    Args:
        pre_process: whether the part embeds tokens.
        post_process: whether the part has the final norm and the output head.
        vp_stage: its rank's virtual stage that it is; None without virtual stages.
        transformer_engine: whether to build with Transformer Engine's linear layers and norms.
        attention: the kernel that attends.
        exchange: among the ranks that share micro-batches.
    """
    backend = linear_backend(transformer_engine=transformer_engine)
    gemm = grouped_gemm(transformer_engine=transformer_engine, dtype=config.params_dtype)
    latent = attention_spec(backend, attention, exchange, compresses_query=model.compresses_query)
    experts = partial(GroupedExperts, gemm=gemm, quantization=model.quantization)
    kinds = {is_moe: layer_spec(backend, latent, experts, is_moe=is_moe) for is_moe in (False, True)}
    block = TransformerBlockSubmodules(
        layer_specs=[kinds[model.is_moe(layer)] for layer in layer_ids],
        layer_norm=layer_norm(backend),
    )
    language_model = LanguageModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=model.vocab_size,
        max_sequence_length=config.balance_sequence_tokens,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    # The schedule calls `backward_dw` of layers, not of the output head.
    delays = config.delay_wgrad_compute
    accumulate_in_main_grad(language_model, later=lambda name: delays and name.startswith("decoder."))
    for module in language_model.modules():
        if isinstance(module, PackedLatentAttention) and module.core_attention.takes_latents:
            lend_weight(module.linear_kv_up_proj, later=delays)
    if post_process:
        add_losses_by_pieces(language_model.output_layer)
    return language_model
