"""Rows of a step's budget that recur in every layer and micro-batch; torch-free."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from k25_train.config.schema import Config
from k25_train.plan.batch_sizes import causal_pairs
from k25_train.plan.expert_copies import EXCHANGES
from k25_train.plan.memory.activations import PackedTensor, stage_tensors
from k25_train.plan.memory.kernels import AttentionKernel, configured_kernels
from k25_train.plan.pipeline import StagePlan
from k25_train.plan.time.budget_row import BudgetRow, moved_s
from k25_train.plan.time.expert_exchange import NUM_SMS, ExpertExchange, expert_exchange
from k25_train.plan.time.step import flops_per_s, layers_s
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.units import GB
from parallel.activations.policy import Policy
from parallel.dispatcher import Dispatcher

ROUTER_PASSES = 12
"""How often a score [tokens, experts] in float32 is read or written, forward and backward. Source: the
operations of megatron-core's router (scores, bias, top-k, balance loss) and their gradients; assumed."""
MOVES_IN_FP8 = 3
"""How often the bytes of a tensor are moved that is stored in FP8: 2 read and 1 written for each element, and
the same back."""
MOVES_MADE_AGAIN = {"mla.up_proj": 0, "norm.output": 2, "mla.up_input": 2, "attention.joined": 2}
"""Tensor -> how often its bytes are moved when it is made again. Products count by their FLOPs; of norms and
copies the input is as large."""
MOVES_OF_SWIGLU = 3
"""The same of an activation: its input is twice as large."""
WAIT_S = 50e-6
"""How long the device has nothing to do in a layer once the host has seen how many tokens come: until the
next kernels are launched. Assumed: ten launches of 5 us; that the other pass's are queued meanwhile is not
counted."""
GAPS_S = 0.15e-3
"""Between the kernels of a layer, forward and backward: some 150 of them, 1 us each. Assumed."""
RANKS_OF_RATE = 16
"""Expert-parallel ranks at most in the published rate: that many GPUs were used."""


def exchange_rows(stage: StagePlan) -> Iterator[BudgetRow]:
    """Tokens to their experts and back, but for passes that overlap with no other (`budget_of_schedule`)."""
    # 1. What the other micro-batch's computation hides, if they overlap.
    config, exchange = stage.config, expert_exchange(stage.config)
    overlaps, passes = config.parallelism.overlap_expert_comm, _moe_passes(stage)
    per_layer_s, layer_s = EXCHANGES * exchange.seconds, _layer_s(stage)
    shown_s = max(0.0, per_layer_s - (layer_s if overlaps else 0.0)) * passes
    name = config.parallelism.dispatcher.value
    how = f"{name}, {1e3 * per_layer_s:.1f} ms a layer, which computes for {1e3 * layer_s:.1f}"
    yield BudgetRow("experts' exchange, not hidden", shown_s, how)
    yield BudgetRow("host waits for counts", WAIT_S * passes, f"{1e6 * WAIT_S:.0f} us a layer, assumed")
    if not overlaps:
        return
    # 2. SMs that computation lacks meanwhile.
    usual_s = _lost_to_sms_s(_as_in_rate(config), layer_s) * passes
    lost_s = _lost_to_sms_s(exchange, layer_s) * passes
    how = f"{exchange.sms} of {NUM_SMS} SMs for {1e3 * per_layer_s:.1f} ms a layer"
    yield BudgetRow("SMs of the exchange", min(usual_s, lost_s), how, in_rate=True)
    yield BudgetRow("more SMs than HybridEP's", max(0.0, lost_s - usual_s), how)


def layer_rows(stage: StagePlan) -> Iterator[BudgetRow]:
    """Kernels of attention, experts and router."""
    config, sizes = stage.config, stage.balanced_sizes
    model, passes = config.model, _moe_passes(stage)
    # 1. Attention.
    kernel = configured_kernels(config).attention
    one_call = kernel in (AttentionKernel.varlen, AttentionKernel.transformer_engine)
    told = kernel.value if one_call else f"not counted: {kernel.value}"
    yield BudgetRow("attention's kernel plans", 0.0, told)
    if config.optim.qk_clip_threshold is not None:
        every = config.optim.qk_clip_interval
        flops = 2 * causal_pairs(sizes.documents) * model.num_attention_heads * model.q_head_dim
        seconds = flops / flops_per_s(config) * _num_layers(stage) * stage.num_micro_batches / every
        yield BudgetRow("largest logits", seconds, f"queries times keys once more, in 1 of {every} steps")
    # 2. Weight gradients, read and written within the product, which is bound by computation otherwise.
    matrix = 3 * model.hidden_size * model.expert_ffn_hidden_size
    weights = matrix * model.num_experts // config.parallelism.ep
    product_s = 2 * matrix * sizes.expert_rows / flops_per_s(config)
    added_s = max(0.0, moved_s(2 * GRADIENT_BYTES * weights) - product_s) * passes
    told = f"{weights / 1e9:.2f}e9 weights a layer, within the product"
    yield BudgetRow("weight gradients added", added_s, told)
    # 3. Rows of tokens to the order of experts and back, forward and backward, which are moved as often with
    #    Transformer Engine as without (`k25_train/model/permutation.py`); the router.
    rows = expert_exchange(config).received_rows + sizes.expert_rows
    num_bytes = 4 * rows * model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    told = f"4 times {rows:,.0f} rows a layer"
    yield BudgetRow("permutation", moved_s(num_bytes) * passes, told, in_rate=True)
    yield BudgetRow("gaps between kernels", GAPS_S * passes, f"{1e3 * GAPS_S:.2f} ms a layer", in_rate=True)
    scores = ROUTER_PASSES * 4 * sizes.tokens * model.num_experts
    told = f"{scores / 1e6:.0f} MB of scores a layer"
    yield BudgetRow("router", moved_s(scores) * passes, told, in_rate=True)


def embedding_row(stage: StagePlan) -> BudgetRow:
    """A row of the embedding's gradient for each token is read, and added in float32."""
    width = stage.config.model.hidden_size * (WEIGHT_BYTES[stage.config.train.dtype] + 2 * GRADIENT_BYTES)
    seconds = moved_s(stage.balanced_sizes.tokens * width) * stage.num_micro_batches
    return BudgetRow("embedding's gradient", seconds, "the rows that were looked up, on the first stage")


def saving_rows(stage: StagePlan) -> Iterator[BudgetRow]:
    """What activation policies cost."""
    config, model, tokens = stage.config, stage.config.model, stage.balanced_sizes.tokens
    tensors = [each for chunk in stage_tensors(stage, stage.balanced_sizes) for each in chunk]
    # 1. Made again: moved, and the up-projections computed.
    again_s = moved_s(
        sum(
            MOVES_MADE_AGAIN.get(each.tensor.name, MOVES_OF_SWIGLU) * each.tensor.num_bytes
            for each in tensors
            if each.policy is Policy.recompute
        )
    )
    if config.activation.policies()["mla.up_proj"] is Policy.recompute:
        query = prod(model.query_widths[-2:])
        key_value = prod(model.key_value_widths[-2:])
        again_s += 2 * tokens * (query + key_value) * _num_layers(stage) / flops_per_s(config)
    how = "norms and copies moved 2 times, activations 3 times; up-projections by FLOPs"
    yield BudgetRow("recomputation", again_s * stage.num_micro_batches, how)
    # 2. Rounded, and copied to the host.
    in_fp8 = [each for each in tensors if each.policy in (Policy.fp8, Policy.fp8_offload)]
    how = "written and read: 3 bytes for each of the tensor's 2, twice"
    yield BudgetRow("FP8 storage", _moved_s(in_fp8) * stage.num_micro_batches, how)
    copied_s = sum(each.host_bytes for each in tensors) / (GB * config.cluster.host_copy_gb_per_s)
    computes_s = layers_s(stage)
    how = f"{1e3 * copied_s:.1f} ms each way, while layers compute for {1e3 * computes_s:.1f}"
    yield BudgetRow("offloading, not hidden", max(0.0, copied_s - computes_s) * stage.num_micro_batches, how)


def _lost_to_sms_s(exchange: ExpertExchange, layer_s: float) -> float:
    """Seconds of a layer that computation loses to the SMs of its exchanges."""
    return min(EXCHANGES * exchange.seconds, layer_s) * exchange.sms / NUM_SMS


def _as_in_rate(config: Config) -> ExpertExchange:
    sizes = replace(
        config.parallelism,
        dispatcher=Dispatcher.hybridep,
        dispatcher_sms=None,
        ep=min(config.parallelism.ep, RANKS_OF_RATE),
    )
    return expert_exchange(replace(config, parallelism=sizes))


def _moved_s(tensors: list[PackedTensor]) -> float:
    return moved_s(MOVES_IN_FP8 * sum(each.tensor.num_bytes for each in tensors))


def _num_layers(stage: StagePlan) -> int:
    return sum(len(chunk.layers) for chunk in stage.chunks)


def _moe_passes(stage: StagePlan) -> int:
    """How often micro-batches pass a layer with experts in a step, on one rank."""
    layers = [layer for chunk in stage.chunks for layer in chunk.layers]
    return sum(stage.config.model.is_moe(layer) for layer in layers) * stage.num_micro_batches


def _layer_s(stage: StagePlan) -> float:
    """How long a layer computes for a micro-batch, forward and backward."""
    return layers_s(stage) / _num_layers(stage)
