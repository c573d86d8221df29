"""megatron-core's decoder layer and mixture of experts, told which tokens are padding.

Padding goes to no expert: all of it is one token, which would go to the same few experts and keep the others
waiting. megatron-core's own `padding_mask` would leave it out of the balance loss alone: it is sent to
experts all the same, counting the tokens of each expert fails (`TopKRouter._apply_expert_bias` lacks a
dimension), and the overlapped schedule does not pass the mask on to layers.
"""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from k25_train.model.dispatcher import DISPATCHERS
from k25_train.model.packed_documents import PackedDocuments


class DocumentExperts(MoELayer):
    """megatron-core's mixture of experts, which leaves padding out."""

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )

    def expect(self, documents: PackedDocuments) -> None:
        """Say what the next micro-batch consists of."""
        self.router.is_padding = documents.is_padding
        self.router.sequence_lengths = documents.tokens_of_sequences(self.config.balance_sequence_tokens)
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
