"""megatron-core's decoder layer and mixture of experts, told which tokens are padding.

Padding goes to no expert: all of it is one token, which would go to the same few experts and keep the others
waiting. megatron-core's own `padding_mask` would leave it out of the balance loss alone: it is sent to
experts all the same, counting the tokens of each expert fails (`TopKRouter._apply_expert_bias` lacks a
dimension), and the overlapped schedule does not pass the mask on to layers.
"""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from k25_train.model.attention import PackedDocuments


class RealTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends each token to its experts, and padding, which has none, nowhere."""

    num_padding = 0
    """Tokens of the next micro-batch that are padding."""

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count what is sent and received, by the map [T, E]; returns the tokens of each local expert."""
        tokens_per_expert = super().preprocess(routing_map)
        # Upstream takes the chosen pairs to be as many as the map has rows, and would send others, too.
        self.num_out_tokens -= self.num_padding * self.config.moe_router_topk
        return tokens_per_expert


class DocumentExperts(MoELayer):
    """megatron-core's mixture of experts, which leaves padding out."""

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = RealTokenDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )

    def expect(self, documents: PackedDocuments) -> None:
        """Say what the next micro-batch consists of."""
        self.router.is_padding = documents.is_padding
        self.token_dispatcher.num_padding = documents.num_padding


class DocumentLayer(TransformerLayer):
    """A decoder layer that tells its experts about the documents.

    megatron-core shows these to attention alone. Attention and router run one right after the other, in the
    overlapped schedule too.
    """

    def _forward_attention(self, *args: Any, packed_seq_params: PackedDocuments, **kwargs: Any) -> Any:
        if self.is_moe_layer:
            self.mlp.expect(packed_seq_params)
        return super()._forward_attention(*args, packed_seq_params=packed_seq_params, **kwargs)
