"""Attention of ranks that share a micro-batch, next to attention of one rank that has it all.

Imports megatron-core only inside the functions: the process that collects the tests does without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.config import ContextExchange
from parallel.context.plan import plan_context
from tests.helpers.ranks import RankContext


@dataclass(frozen=True)
class Documents:
    """Documents of a micro-batch."""

    lengths: tuple[int, ...]
    padding: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Compared:
    """How far attention of several ranks is from that of one, relative to the largest number of each."""

    output: float
    of_hidden: float
    of_weights: dict[str, float]
    max_logits: float
    sent_bytes: tuple[int, int]
    """Bytes that this rank sent, in the forward and in the backward pass."""


def build_attention(exchange: Any, model: Any, kernel: Any) -> Any:
    """The attention of one layer, with the same random weights whatever the exchange."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from k25_train.model.backbone import attention_spec, linear_backend
    from k25_train.model.context_attention import lend_weight
    from k25_train.model.megatron_config import backbone_config
    from parallel.megatron.wgrad import accumulate_in_main_grad
    from tests.helpers.model_chunks import train_config
    from tests.helpers.parallel_sizes import even_layout, parallel_sizes

    backbone = backbone_config(model, train_config(), parallel_sizes(), even_layout(model.num_layers))
    spec = attention_spec(
        linear_backend(transformer_engine=False), kernel, exchange, compresses_query=model.compresses_query
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    attention = build_module(spec, config=backbone, layer_number=1, pg_collection=groups)
    accumulate_in_main_grad(attention, later=lambda _: False)
    if attention.core_attention.takes_latents:
        lend_weight(attention.linear_kv_up_proj, later=False)
    for number, (name, weight) in enumerate(sorted(attention.named_parameters())):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            spread = 0.1 if "norm" in name else 0.2
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread + ("norm" in name))
    attention.core_attention.record_max_logits = True
    return attention.train()


def run(attention: Any, hidden: Tensor, gradient: Tensor, documents: Any) -> dict[str, Any]:
    """Outputs and gradients of a pass over hidden states [t, D]."""
    attention.core_attention.max_logits = None
    attention.zero_grad()
    hidden = hidden.clone().unsqueeze(1).requires_grad_()
    output, _ = attention(hidden, None, packed_seq_params=documents)
    output.backward(gradient.unsqueeze(1))
    return {
        "output": output.detach().squeeze(1),
        "hidden": hidden.grad.squeeze(1),
        "weights": {name: each.grad for name, each in attention.named_parameters()},
        "max_logits": attention.core_attention.max_logits,
    }


def compare(
    context: RankContext,
    cases: Sequence[Documents],
    kinds: Sequence[ContextExchange],
    overrides: dict[str, Any],
) -> list[Compared]:
    """Each case with each exchange, on a rank of those that share the micro-batch."""
    import torch.distributed as dist

    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.plan.memory.kernels import AttentionKernel
    from parallel.context.exchange import NOT_SHARED, build_exchange
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import start
    from tests.helpers.parallel_sizes import parallel_sizes

    model, cp, device = tiny_model_config(**overrides), context.world_size, torch.device("cpu")
    topology = start(context, parallel_sizes(cp=cp), model.num_layers)
    whole = build_attention(NOT_SHARED, model, AttentionKernel.cpu)
    found = []
    for kind in kinds:
        exchange = build_exchange(kind, topology.groups.cp)
        shared = build_attention(exchange, model, AttentionKernel.cpu)
        for case in cases:
            generator = torch.Generator().manual_seed(case.tokens)
            hidden, gradient = torch.randn(2, case.tokens, model.hidden_size, generator=generator)
            expected_documents = PackedDocuments.of(case.lengths, device, case.padding)
            # Nobody reads what padding gets.
            gradient[expected_documents.is_padding.squeeze(1)] = 0.0
            expected = run(whole, hidden, gradient, expected_documents)
            plan = plan_context(case.lengths, case.padding, cp)
            documents = PackedDocuments.of_shard(plan, topology.cp_rank, device)
            places, sent = documents.places, exchange.sent_bytes
            result = run(shared, hidden[places], gradient[places], documents)
            sent = exchange.sent_bytes - sent
            for weight in result["weights"].values():
                dist.all_reduce(weight, group=topology.groups.cp)
            largest = result["max_logits"]
            if largest is None:
                largest = torch.full((model.num_attention_heads,), -torch.inf)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=topology.groups.cp)
            is_real = ~documents.is_padding.squeeze(1)
            found.append(
                Compared(
                    output=far(result["output"][is_real], expected["output"][places][is_real]),
                    of_hidden=far(result["hidden"], expected["hidden"][places]),
                    of_weights={
                        name: far(each, expected["weights"][name]) for name, each in result["weights"].items()
                    },
                    max_logits=0.0
                    if expected["max_logits"] is None
                    else far(largest, expected["max_logits"]),
                    sent_bytes=(sent, 0),
                )
            )
    return found


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    if not found.numel():
        return 0.0
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest or 1.0)
