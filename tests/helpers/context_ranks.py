"""Attention of ranks that share a micro-batch, next to attention of one rank that has it all.

Imports megatron-core only inside the functions: the process that collects the tests does without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
    """How far attention of several ranks is from that of one, relative to the numbers of each."""

    output: float
    of_hidden: float
    of_weights: dict[str, float]
    max_logits: float
    """Absolute."""
    sent_bytes: int
    """Bytes that this rank sent in both passes."""


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
            is_norm = "norm" in name
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + is_norm)
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
    kernel: str = "cpu",
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> list[Compared]:
    """Each case with each exchange, on a rank of those that share the micro-batch.

    `kernel` is the name of an `AttentionKernel`, of which those for CUDA run as their twins.
    """
    from k25_train.plan.memory.kernels import AttentionKernel
    from parallel.context.exchange import NOT_SHARED, build_exchange
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import start
    from tests.helpers.parallel_sizes import parallel_sizes

    model = tiny_model_config(**overrides)
    topology = start(context, parallel_sizes(cp=context.world_size), model.num_layers)
    kernels_on_cpu()
    whole = build_attention(NOT_SHARED, model, AttentionKernel.cpu)
    found = []
    for kind in kinds:
        exchange = build_exchange(kind, topology.groups.cp)
        shared = build_attention(exchange, model, AttentionKernel[kernel])
        found += [compare_case(case, whole, shared, exchange, topology) for case in cases]
    return found


def kernels_on_cpu() -> None:
    """Let kernels for CUDA run here."""
    from k25_train.model import context_kernels
    from tests.helpers.packed_attention import efficient_on_cpu, varlen_on_cpu

    varlen_on_cpu()
    efficient_on_cpu()
    context_kernels.largest_logits = dense_largest_logits


def dense_largest_logits(
    query: Tensor, key: Tensor, first_keys: Tensor, last_keys: Tensor, scale: float
) -> Tensor:
    """What the kernel for CUDA computes."""
    keys = torch.arange(len(key))
    attends = (keys >= first_keys[:, None]) & (keys <= last_keys[:, None])
    logits = torch.einsum("qhc,khc->hqk", query.float(), key.float()) * scale
    return logits.masked_fill(~attends, -torch.inf).amax((1, 2))


def compare_case(case: Documents, whole: Any, shared: Any, exchange: Any, topology: Any) -> Compared:
    """One case on this rank."""
    import torch.distributed as dist

    from k25_train.model.packed_documents import PackedDocuments

    # 1. On one rank, which has it all. Nobody reads what padding gets.
    device, heads = torch.device("cpu"), whole.config.num_attention_heads
    generator = torch.Generator().manual_seed(case.tokens)
    hidden, gradient = torch.randn(2, case.tokens, whole.config.hidden_size, generator=generator)
    documents = PackedDocuments.of(case.lengths, device, case.padding)
    gradient[documents.is_padding.squeeze(1)] = 0.0
    expected = run(whole, hidden, gradient, documents)
    # 2. On all ranks together.
    plan = plan_context(case.lengths, case.padding, topology.cp_size)
    documents = PackedDocuments.of_shard(plan, topology.cp_rank, device)
    places, before = documents.places, exchange.sent_bytes
    found = run(shared, hidden[places], gradient[places], documents)
    for weight in found["weights"].values():
        dist.all_reduce(weight, group=topology.groups.cp)
    minus_infinity = torch.full((heads,), -torch.inf)
    largest = minus_infinity if found["max_logits"] is None else found["max_logits"]
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=topology.groups.cp)
    is_real = ~documents.is_padding.squeeze(1)
    size = max(each.norm().item() for each in expected["weights"].values())
    assert found["output"].isfinite().all() and found["hidden"].isfinite().all()
    return Compared(
        output=far(found["output"][is_real], expected["output"][places][is_real]),
        of_hidden=far(found["hidden"], expected["hidden"][places]),
        of_weights={
            name: far(each, expected["weights"][name], least_size=0.1 * size)
            for name, each in found["weights"].items()
        },
        max_logits=(largest - (minus_infinity if expected["max_logits"] is None else expected["max_logits"]))
        .nan_to_num()
        .abs()
        .max()
        .item(),
        sent_bytes=exchange.sent_bytes - before,
    )


def far(found: Tensor, expected: Tensor, least_size: float = 0.0) -> float:
    """How far all numbers are from those expected, relative to these, or to `least_size`: documents of one
    token have no gradient for their queries, but for rounding."""
    distance, size = (found - expected).norm().item(), expected.norm().item()
    return distance / (max(size, least_size) or 1.0)


def gradient_of_one_ranks_input(context: RankContext, kind: ContextExchange) -> float:
    """Size of the gradient that the second rank's input gets, which alone needs any; 0 on the others."""
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.plan.memory.kernels import AttentionKernel
    from parallel.context.exchange import build_exchange
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import start
    from tests.helpers.parallel_sizes import parallel_sizes

    model = tiny_model_config()
    topology = start(context, parallel_sizes(cp=context.world_size), model.num_layers)
    exchange = build_exchange(kind, topology.groups.cp)
    attention = build_attention(exchange, model, AttentionKernel.cpu).requires_grad_(False)
    plan = plan_context((256,), (), context.world_size)
    documents = PackedDocuments.of_shard(plan, topology.cp_rank, torch.device("cpu"))
    hidden = torch.randn(plan.num_tokens, 1, model.hidden_size, requires_grad=topology.cp_rank == 1)
    output, _ = attention(hidden, None, packed_seq_params=documents)
    output.sum().backward()
    return 0.0 if hidden.grad is None else hidden.grad.norm().item()
