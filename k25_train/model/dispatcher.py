"""Sends tokens to the ranks of their experts and adds up what comes back: megatron-core's dispatchers, for which
padding is nothing, and which add up in float32.

| `parallelism.dispatcher` | sends | adds up the experts' outputs of a token, and the gradients of its copies |
|---|---|---|
| `alltoall` | a copy for each expert | where the token is from: all of them in float32, by `permutation.py` or with Transformer Engine by its kernel; rounded once |
| `deepep` | a copy for each rank, between nodes one for each node | those of a rank there, as above; then DeepEP in float32, rounding to bfloat16 after a node and at the end |
| `hybridep` | the same | HybridEP in float32, rounding to bfloat16 after a node and at the end |
| `ncclep` | the same | NCCL EP, which descends from HybridEP; its sums were not read |

Padding goes to no expert: all of it is one token, which would go to the same few experts and keep the others
waiting.

Shapes: T tokens of a micro-batch, R rows that a rank receives, D hidden, E experts, K experts of a token.
"""  # noqa: E501

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
    _DeepepManager,
    _NCCLEPManager,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from k25_train.model.permutation import Routes, order_by_expert, reorder, rows_of_experts, sums_of_tokens


class AlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """A row for each pair of a token and an expert, exchanged by an all-to-all.

    The host waits once per pass, for the numbers of rows that the exchange needs.
    """

    num_padding = 0
    """Tokens of the next micro-batch that are padding."""

    @property
    def sorts_rows(self) -> bool:
        """Whether rows arrive rank by rank, each with rows of several experts."""
        return self.ep_size > 1 and self.num_local_experts > 1

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count what is sent and received, by the map [T, E]; returns the tokens of each local expert."""
        tokens_per_expert = super().preprocess(routing_map)
        # Upstream takes the chosen pairs to be as many as the map has rows, and would send others, too.
        self.num_out_tokens -= self.num_padding * self.config.moe_router_topk
        if self.sorts_rows:
            # [ranks, local experts]; upstream goes on to move its own to the host.
            self.rows_from_ranks = self.num_global_tokens_per_local_expert
        return tokens_per_expert

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [T, 1, D], map and probs [T, E] -> a row for each pair, and its weight."""
        # Transformer Engine's kernel refuses to send nothing.
        self.is_fused = self.config.moe_permute_fusion and self.num_padding < len(routing_map)
        if self.is_fused:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_1", self.preprocess(routing_map)
        )
        self.routes = Routes.of(routing_map, self.num_out_tokens)
        return rows_of_experts(hidden_states.view(-1, self.hidden_shape[-1]), probs, self.routes)

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, D] and weights [R] as received -> sorted by expert, with the rows of each in between."""
        if self.config.moe_permute_fusion:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        rows, weights = global_input_tokens, global_probs
        for point in ("before_permutation_2", "before_finish"):
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(point, self.tokens_per_expert)
        if self.sorts_rows:
            self.order, self.inverse = order_by_expert(self.rows_from_ranks, len(rows))
            rows, weights = reorder(self.order, self.inverse, rows, weights)
        return rows, self.tokens_per_expert, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs [R, D] in the order in which their rows were received."""
        if self.config.moe_permute_fusion:
            return super().combine_preprocess(hidden_states)
        return reorder(self.inverse, self.order, hidden_states)[0] if self.sorts_rows else hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """The outputs of this rank's pairs -> their sums, in the shape of the tokens."""
        if self.is_fused:
            return super().combine_postprocess(permutated_local_input_tokens)
        return sums_of_tokens(permutated_local_input_tokens, self.routes).view(self.hidden_shape)


class FlexDispatcher(MoEFlexTokenDispatcher):
    """The kernels of DeepEP, HybridEP or NCCL EP.

    The host waits once per pass, for the numbers of rows that arrive.
    """

    num_padding = 0
    """Tokens of the next micro-batch that are padding. Of them, the map says enough here."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        managers = {"deepep": DeepEP, "ncclep": NcclEP}
        # HybridEP reads the map itself, and takes rows of any number.
        if config.moe_flex_dispatcher_backend in managers:
            self._comm_manager = managers[config.moe_flex_dispatcher_backend](
                group=self.tp_ep_group,
                num_local_experts=num_local_experts,
                router_topk=config.moe_router_topk,
                num_experts=config.num_moe_experts,
                config=config,
            )


class DeepEP(_DeepepManager):
    """Upstream's calls of DeepEP, without padding and without waiting for the device."""

    token_indices: Tensor

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """The experts [T, K] of each token and their weights; -1 for those that it does not have."""
        super().setup_metadata(routing_map, probs)
        is_chosen = routing_map.reshape(-1, self.num_experts).gather(1, self.token_indices)
        self.token_indices = self.token_indices.masked_fill(~is_chosen, -1)

    def get_permuted_hidden_states_by_experts(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Received tokens [R, D] -> a row for each local expert of each, sorted by expert, and its weight."""
        # Counts are on the host.
        num_rows = int(self.tokens_per_expert.sum())
        self.is_fused = self.permute_fusion and num_rows > 0
        if self.is_fused:
            return super().get_permuted_hidden_states_by_experts(hidden_states)
        routing_map, probs = self._indices_to_multihot(self.dispatched_indices, self.dispatched_probs)
        self.routes = Routes.of(routing_map, num_rows)
        return rows_of_experts(hidden_states, probs, self.routes)

    def get_restored_hidden_states_by_experts(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs -> their sums for each received token, [R, D]."""
        if self.is_fused:
            return super().get_restored_hidden_states_by_experts(hidden_states)
        return sums_of_tokens(hidden_states, self.routes)

    def _indices_to_multihot(self, indices: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Local experts [R, K] of received tokens, -1 for others', and weights -> map and weights [R, E].

        Upstream's own takes indices by a mask, for which the host waits.
        """
        shape = (len(indices), self.num_local_experts + 1)
        # Others' share a column that is cut off.
        column = indices.masked_fill(indices < 0, self.num_local_experts)
        routing_map = torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter_(1, column, True)
        weights = torch.zeros(shape, dtype=torch.float32, device=indices.device).scatter(1, column, probs)
        return routing_map[:, :-1].contiguous(), weights[:, :-1].contiguous()


class NcclEP(_NCCLEPManager):
    """Upstream's calls of NCCL EP, with padding spread over all experts.

    Its interface does not say that a token may go nowhere. Padding goes with a weight of zero, which makes
    its outputs and all of its gradients zeros, and to no expert more than to others.
    """

    token_indices: Tensor
    token_probs: Tensor
    tokens_per_expert: Tensor

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """The experts [T, K] of each token and their weights."""
        super().setup_metadata(routing_map, probs)
        is_chosen = routing_map.reshape(-1, self.num_experts).gather(1, self.token_indices)
        spread = torch.arange(is_chosen.numel(), device=is_chosen.device).view_as(is_chosen)
        self.token_indices = self.token_indices.where(is_chosen, spread % self.num_experts)
        self.token_probs = self.token_probs.masked_fill(~is_chosen, 0.0)

    def get_permuted_hidden_states_by_experts(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Received rows [capacity, D], sorted by expert -> those that there are, [R, D], and their weights.

        Upstream waits for their number alone, and the experts' products would wait for the counts, each.
        """
        self.tokens_per_expert = self.tokens_per_expert.cpu()
        return super().get_permuted_hidden_states_by_experts(hidden_states)


DISPATCHERS: dict[str, type[MoETokenDispatcher]] = {"alltoall": AlltoAllDispatcher, "flex": FlexDispatcher}
"""megatron-core's name of a type (`moe_token_dispatcher_type`) -> ours."""
