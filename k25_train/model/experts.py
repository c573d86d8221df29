"""Routed experts as two stacked weights and two grouped matrix products, on CPU and CUDA alike.

megatron-core has grouped experts only with Transformer Engine. Without it, every expert is a separate module,
which on a CPU costs 40% (8 experts) to 65% (64 experts) of a training step. `F.grouped_mm` runs on both.

Shapes: T tokens sent to this rank's experts, E experts of this rank, D hidden, F expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from k25_train.model.swiglu import weighted_swiglu
from parallel.activations.annotate import named, recomputed
from parallel.megatron.deferred_wgrad import defer_wgrads, grouped_linear_deferring_wgrad


class GroupedExperts(MegatronModule):
    """This rank's experts of one layer (SwiGLU, no bias).

    Parameters: `gate_up_proj` [E, 2F, D], rows of the gate first, and `down_proj` [E, D, F]. `grouped_mm`
    needs rows that are multiples of 16 bytes; the configuration checks that.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.ep_group, self.expert_dp_group = pg_collection.ep, pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * width, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden, width, **options))
        for parameter in self.parameters():
            # Marks expert weights for megatron-core: reduced over the expert-data-parallel group only. Set
            # with EP=1 too, so that the optimizer has the same two parts in every layout.
            parameter.allreduce = False
        self.wgrads = (
            defer_wgrads(self, self.gate_up_proj, self.down_proj) if config.delay_wgrad_compute else None
        )

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """Run each token through its expert.

        Args:
            tokens: [T, D], sorted by expert.
            tokens_per_expert: [E] integers with sum T.
            weights: [T] the router's weight of each token, applied before the down-projection.

        Returns the experts' outputs [T, D], and None where megatron-core expects a bias.
        """
        if tokens.shape[0] == 0:
            return self._no_tokens(tokens, weights), None
        counts = torch.as_tensor(tokens_per_expert, device=tokens.device)
        ends_E = counts.cumsum(0).to(torch.int32)
        gate_up_T2F = self._product(named("moe.up_input", tokens), self.gate_up_proj, ends_E)
        hidden_TF = recomputed(
            "moe.down_input",
            weighted_swiglu,
            named("moe.swiglu_input", gate_up_T2F),
            named("moe.probs", weights),
        )
        return self._product(hidden_TF, self.down_proj, ends_E), None

    def _product(self, tokens: Tensor, weights: nn.Parameter, ends: Tensor) -> Tensor:
        """`grouped_linear`, whose weight gradients may be computed later (`parallelism.delay_wgrad`)."""
        if self.wgrads is None:
            return grouped_linear(tokens, weights, ends)
        return grouped_linear_deferring_wgrad(tokens, weights, ends, self.wgrads)

    def _no_tokens(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """An empty output [0, D] that depends on everything that an output of tokens depends on.

        The experts' weights get a gradient of zeros. The router's weights get one without rows, which makes
        this rank take part in the exchange in which all ranks send such gradients back.
        """
        hidden_TF = tokens @ self.gate_up_proj[0, : self.down_proj.shape[2]].T
        return (hidden_TF * weights.unsqueeze(-1).to(tokens.dtype)) @ self.down_proj[0].T

    def backward_dw(self) -> None:
        """Compute the weight gradients that backward has left pending, if they are delayed."""
        if self.wgrads is not None:
            self.wgrads.compute()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Both weights, sharded over expert-parallel ranks along their expert axis."""
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (axis, self.ep_group.rank(), self.ep_group.size()),
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, parameter in self.named_parameters()
        }


def grouped_linear(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows with its group's matrix.

    Args:
        tokens: [T, In], grouped by expert.
        weights: [E, Out, In].
        ends: [E] int32, the index of the row after each group's last.

    Returns [T, Out].
    """
    return F.grouped_mm(tokens, weights.transpose(1, 2), offs=ends)
