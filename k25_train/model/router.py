"""The `noaux_tc` router of K2.5: megatron-core's top-k router with a balance loss per training sequence."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from parallel.activations.annotate import saves
from parallel.context.exchange import PHASE
from parallel.megatron.patches.instrument import waiting_for


class SequenceBalancedRouter(TopKRouter):
    """Sigmoid scores, a bias per expert that affects only the choice, and a balance loss per sequence.

    A micro-batch reaches the layers as one row of packed tokens. Upstream's sequence-wise balance loss would
    treat that row as a single sequence, and its value would depend on the micro-batch size. Here the loss is
    computed over the sequences of `config.balance_sequence_tokens` tokens that make up the row.

    Padding has no expert and counts nowhere: not as load that moves the expert bias, and not in the balance
    loss, which is what it would be if the sequence ended before the padding.

    With context parallelism a rank has some of a sequence's tokens: the numbers of tokens, and of those that
    choose an expert, are added up over the ranks that share it; scores stay where they are, so that losses
    and gradients of these ranks add up to those of one.

    Shapes: T tokens of a micro-batch that the rank holds, S sequences of L tokens, E experts of the layer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self.weight.device
        # In float32, sums over ranks and experts of a global batch of 67M tokens would be rounded.
        loads_E = torch.zeros(self.num_experts, dtype=torch.float64, device=device)
        self.register_buffer("local_tokens_per_expert", loads_E, persistent=False)
        self.is_padding = torch.zeros(1, 1, dtype=torch.bool, device=device)
        """Which tokens of the next micro-batch are padding, [T, 1] bool; [1, 1] stands for all of them."""
        self.sequence_lengths: tuple[int, ...] = ()
        """Tokens of each of its sequences that this rank holds, one sequence after another; read where ranks
        share sequences."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Route tokens [T, 1, D] as the base class does, and name what is saved."""
        with saves("router.scores"):
            return super().forward(input, padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E] of the chosen experts, and which are chosen, [T, E] bool: for padding, none."""
        probs, routing_map = super().routing(logits, padding_mask)
        return probs, routing_map.masked_fill(self.is_padding, value=False)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert in `routing_map` [T, E]; after the step they move its bias."""
        super()._apply_expert_bias(routing_map.masked_fill(self.is_padding, value=False), padding_mask)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the balance loss to `probs` [T, E]; scores and routing map are [T, E] too.

        Equations 17 to 20 of the DeepSeek-V3 report (arXiv 2412.19437) for each sequence, times its tokens:
        the schedule divides by those of the global batch, so that the loss is a mean over tokens, however
        they are divided into sequences, micro-batches and ranks.
        """
        config = self.config
        # 1. Of each sequence: tokens, how many of them choose an expert, and the sums of their scores.
        counted_T1 = ~self.is_padding.expand(len(probs), 1)
        tokens_S1, chosen_SE, scores_SE = map(
            self._sums_of_sequences,
            (
                counted_T1,
                routing_map & counted_T1,
                scores_for_aux_loss.masked_fill(self.is_padding, 0.0),
            ),
        )
        if self.shares_sequences:
            counts = torch.cat([tokens_S1, chosen_SE], dim=1)
            with waiting_for(dist.get_process_group_ranks(self.cp_group), PHASE):
                dist.all_reduce(counts, group=self.cp_group)
            tokens_S1, chosen_SE = counts[:, :1], counts[:, 1:]
        # 2. The loss, whose gradient the balance scale multiplies. A sequence of padding alone adds nothing.
        coefficient = self.get_aux_loss_coeff("seq_aux_loss") * config.num_moe_experts / self.topk
        frequencies_SE = chosen_SE * (coefficient / tokens_S1.clamp(min=1))
        return MoEAuxLossAutoScaler.apply(probs, (scores_SE * frequencies_SE).sum())

    @property
    def shares_sequences(self) -> bool:
        """Whether other ranks hold tokens of the same sequences."""
        return self.cp_group.size() > 1

    def _sums_of_sequences(self, of_tokens: Tensor) -> Tensor:
        """[T, N] -> [S, N], the sums over the tokens of each sequence that this rank holds."""
        if not self.shares_sequences:
            return of_tokens.unflatten(0, (-1, self.config.balance_sequence_tokens)).sum(1)
        return torch.stack([each.sum(0) for each in of_tokens.split(self.sequence_lengths)])
