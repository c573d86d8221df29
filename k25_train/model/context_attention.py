"""Attention of a layer whose micro-batches several ranks share (`parallel/context`)."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from k25_train.model.context_kernels import block_kernel
from k25_train.model.document_attention import RecordingAttention
from k25_train.model.latent_keys import LatentKeys
from k25_train.model.megatron_config import BackboneConfig
from k25_train.model.packed_documents import PackedDocuments
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.activations.annotate import saves
from parallel.context.attention import ContextAttention
from parallel.context.exchange import LatentExchange
from parallel.megatron.wgrad import WeightGradients, own_weight_gradients


class SharedDocumentAttention(RecordingAttention):
    """Causal attention inside each document, of which other ranks have parts."""

    takes_latents = True

    def __init__(
        self,
        config: BackboneConfig,
        layer_number: int,
        *,
        kernel: AttentionKernel,
        exchange: LatentExchange,
        softmax_scale: float,
        **_: Any,
    ) -> None:
        super().__init__(config, layer_number)
        self.softmax_scale = softmax_scale
        self._exchange = exchange
        self._kernel = block_kernel(kernel, softmax_scale)
        self._keys_and_values = LatentKeys(
            config.num_attention_heads, config.kv_lora_rank, config.qk_head_dim, config.v_head_dim
        )

    def forward(
        self,
        query: Tensor,
        latents: Tensor,
        documents: PackedDocuments,
        weight: nn.Parameter,
        wgrads: WeightGradients,
    ) -> Tensor:
        """Attend: query [t, H, Q], latents [t, L + R] of the rank's tokens -> [t, H * V].

        `weight` [H * (N + V), L] makes keys and values; its gradient goes to `wgrads`. A collective call of
        the ranks that share the micro-batch.
        """
        attend = ContextAttention(
            exchange=self._exchange,
            blocks=documents.shard.blocks(self._exchange.order),
            kernel=self._kernel,
            keys_and_values=self._keys_and_values,
            wgrads=wgrads,
            measure=self.note if self.records else ignore,
            measures=self.records,
        )
        with saves("attention.output"):
            return attend(query, latents, weight).flatten(1)


def ignore(_largest: Tensor) -> None:
    """Largest logits that nobody wants."""


def lend_weight(module: nn.Module, *, later: bool) -> None:
    """Let a linear layer call what it is given, with its weight and what takes the weight's gradient.

    Blocks of latents are projected inside of attention. Through the layer's own call, whoever waits before it
    runs for its weight to be gathered, still does. `later`: its gradient waits for `backward_dw`.
    """
    wgrads = own_weight_gradients(module, module.weight, later=later)  # type: ignore[arg-type]
    module.backward_dw = wgrads.compute  # type: ignore[assignment]
    module.forward = partial(_call_with_weight, module, wgrads)


def _call_with_weight(module: nn.Module, wgrads: WeightGradients, attend: Any) -> Tensor:
    return attend(weight=module.weight, wgrads=wgrads)
