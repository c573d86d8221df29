"""The `noaux_tc` router of K2.5: megatron-core's top-k router with a balance loss per training sequence."""

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from parallel.activations.annotate import saves


class SequenceBalancedRouter(TopKRouter):
    """Sigmoid scores, a bias per expert that affects only the choice, and a balance loss per sequence.

    A micro-batch reaches the layers as one row of packed tokens. Upstream's sequence-wise balance loss would
    treat that row as a single sequence, and its value would depend on the micro-batch size. Here the loss is
    computed over the sequences of `config.balance_sequence_tokens` tokens that make up the row.

    Shapes: T tokens of a micro-batch, D hidden, E experts of the layer.
    """

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Route tokens [T, 1, D] as the base class does, and name what is saved."""
        with saves("router.scores"):
            return super().forward(input, padding_mask)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the balance loss to `probs` [T, E]; scores and routing map are [T, E] too."""
        tokens = self.config.balance_sequence_tokens
        num_sequences = seq_length * bsz // tokens

        def interleave(per_token_TE: Tensor) -> Tensor:
            # Upstream expects the tokens of all sequences interleaved: position-major.
            return per_token_TE.unflatten(0, (num_sequences, tokens)).transpose(0, 1).flatten(0, 1)

        return super()._apply_seq_aux_loss(
            probs,
            interleave(scores_for_aux_loss),
            interleave(routing_map),
            tokens,
            num_sequences,
            with_padding_mask,
        )
