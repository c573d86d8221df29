"""Routed experts as two stacked weights and two grouped matrix products, on CPU and CUDA alike.

megatron-core has grouped experts only with Transformer Engine. Without it, every expert is a separate module,
which on a CPU costs 40% (8 experts) to 65% (64 experts) of a training step. Which kernels multiply is up to
`grouped_gemm.py`, with which weights up to `quantization.py`.

Shapes: T tokens sent to this rank's experts, E experts of this rank, D hidden, F expert width.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from k25_train.config.model import Quantization
from k25_train.model.grouped_gemm import GroupedGemm, RowGroups, grouped_linear
from k25_train.model.quantization import computed_weights
from k25_train.model.swiglu import weighted_swiglu
from parallel.activations.annotate import named, recomputed
from parallel.megatron.wgrad import own_weight_gradients


class GroupedExperts(MegatronModule):
    """This rank's experts of one layer (SwiGLU, no bias).

    Parameters: `gate_up_proj` [E, 2F, D], rows of the gate first, and `down_proj` [E, D, F]. Grouped products
    need rows that are multiples of 16 bytes; the configuration checks that.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        # Megatron-core gives it; nothing here communicates.
        pg_collection: ProcessGroupCollection,
        gemm: GroupedGemm,
        quantization: Quantization = Quantization.none,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.gemm = gemm
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * width, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden, width, **options))
        for parameter in self.parameters():
            # Marks expert weights for megatron-core: reduced over the expert-data-parallel group only. Set
            # with EP=1 too, so that the optimizer has the same two parts in every layout.
            parameter.allreduce = False
        # A module of its own: buffers without a place in checkpoints.
        self.computed = computed_weights(
            quantization, gate_up_proj=self.gate_up_proj, down_proj=self.down_proj
        )
        later = config.delay_wgrad_compute
        self.wgrads = own_weight_gradients(self, self.gate_up_proj, self.down_proj, later=later)

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
        groups = self.gemm.groups(tokens_per_expert, tokens.device)
        if tokens.shape[0] == 0:
            return self._no_tokens(tokens, groups, weights), None
        gate_up_T2F = self._product(named("moe.up_input", tokens), "gate_up_proj", groups)
        hidden_TF = recomputed(
            "moe.down_input",
            weighted_swiglu,
            named("moe.swiglu_input", gate_up_T2F),
            named("moe.probs", weights),
        )
        return self._product(hidden_TF, "down_proj", groups), None

    def _product(self, tokens: Tensor, name: str, groups: RowGroups) -> Tensor:
        weights: nn.Parameter = getattr(self, name)
        return grouped_linear(
            tokens, weights, groups, self.gemm, self.wgrads, computed=self.computed.of(name, weights)
        )

    def _no_tokens(self, tokens: Tensor, groups: RowGroups, weights: Tensor) -> Tensor:
        """An empty output [0, D] that depends on everything that an output of tokens depends on.

        The experts' weights get no gradient, and data parallelism is told that it is complete. The router's
        weights get one without rows, which makes this rank take part in the exchange in which all ranks send
        such gradients back. Nothing is named: there is nothing to save.
        """
        gate_up_T2F = self._product(tokens, "gate_up_proj", groups)
        return self._product(weighted_swiglu(gate_up_T2F, weights), "down_proj", groups)

    def backward_dw(self) -> None:
        """Compute the weight gradients that backward has left pending, if they are delayed."""
        self.wgrads.compute()
