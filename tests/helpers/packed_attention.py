"""Attention over packed rows as `cu_seqlens` describe it, in plain operations: what CUDA's kernels compute.

`varlen_on_cpu` gives torch's `varlen_attn` these as its CPU kernels, so that code for CUDA runs here with
values and gradients; it stays so for the rest of the process. `DotProductAttention` stands in for Transformer
Engine's.

Shapes: T rows, K rows of keys, H heads, Q head size of queries and keys, V of values, N documents.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen


def spans(bounds_q: Tensor, bounds_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys of each document."""
    of_queries, of_keys = bounds_q.tolist(), bounds_k.tolist()
    for first, last, first_key, last_key in zip(
        of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False
    ):
        yield slice(first, last), slice(first_key, last_key)


def logits_of(query: Tensor, key: Tensor, scale: float, is_causal: bool) -> Tensor:
    """[H, L, M] float64 of queries [L, H, Q] and keys [M, H, Q]; minus infinity where nothing is attended. If
    it is causal, the last key is the last query's own."""
    logits = torch.einsum("lhq,mhq->hlm", query.double(), key.double()) * scale
    later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
    return logits.masked_fill(later, -torch.inf) if is_causal else logits


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments and results of `torch_attn::_varlen_attn`: output, log-sum-exps [H, T], seed."""
    assert query.shape[1:] == key.shape[1:] == value.shape[1:], "heads must be alike"
    output, lse = torch.zeros_like(query), torch.full((query.shape[1], len(query)), -torch.inf)
    for rows, keys in spans(cu_seq_q, cu_seq_k):
        assert rows.stop - rows.start <= max_q and keys.stop - keys.start <= max_k
        logits = logits_of(query[rows], key[keys], scale or query.shape[-1] ** -0.5, is_causal)
        lse[:, rows] = logits.logsumexp(2).float()
        attended = torch.einsum("hlm,mhv->lhv", logits.softmax(2), value[keys].double())
        output[rows] = attended.to(output.dtype)
    return output, lse, torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments and results of `torch_attn::_varlen_attn_backward`; as in the kernel, output and
    log-sum-exps may be those of more keys."""
    gradients = [torch.zeros_like(each) for each in (query, key, value)]
    factor = scale or query.shape[-1] ** -0.5
    for rows, keys in spans(cu_seq_q, cu_seq_k):
        logits = logits_of(query[rows], key[keys], factor, is_causal)
        weights = (logits - lse[:, rows].double().unsqueeze(2)).exp()
        of_output = grad_out[rows].double()
        of_weights = torch.einsum("lhv,mhv->hlm", of_output, value[keys].double())
        mean = (of_output * out[rows].double()).sum(2).T.unsqueeze(2)
        of_logits = weights * (of_weights - mean) * factor
        found = (
            (rows, torch.einsum("hlm,mhq->lhq", of_logits, key[keys].double())),
            (keys, torch.einsum("hlm,lhq->mhq", of_logits, query[rows].double())),
            (keys, torch.einsum("hlm,lhv->mhv", weights, of_output)),
        )
        for gradient, (where, values) in zip(gradients, found, strict=True):
            gradient[where] = values.to(gradient.dtype)
    return gradients[0], gradients[1], gradients[2]


def varlen_on_cpu() -> None:
    """Let `varlen_attn` take CPU tensors in this process."""
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, *more: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """The arguments and results of `aten::_efficient_attention_forward` of one document, [1, L, H, Q] and so
    on: log-sum-exps are filled up to 32 rows."""
    bias, *bounds, dropout, mask, wants_sums = more
    assert (bias, bounds, dropout, wants_sums) == (None, [None] * 4, 0.0, True) and mask in (0, 2)
    logits = logits_of(query[0], key[0], scale, mask == 2)
    output = torch.einsum("hlm,mhv->lhv", logits.softmax(2), value[0].double()).to(query.dtype)
    sums = F.pad(logits.logsumexp(2).float(), (0, -query.shape[1] % 32), value=torch.inf)
    seed = torch.zeros((), dtype=torch.int64)
    return output.unsqueeze(0), sums.unsqueeze(0), seed, seed, query.shape[1], key.shape[1]


def efficient_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *more: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments and results of `aten::_efficient_attention_backward` of one document."""
    bias, output, bounds_q, bounds_k, max_q, max_k, sums, dropout, _seed, _offset, mask, bias_needs = more
    assert (bias, bounds_q, bounds_k, dropout, bias_needs) == (None, None, None, 0.0, False)
    assert (max_q, max_k) == (query.shape[1], key.shape[1]) and sums.shape[2] % 32 == 0
    assert sums[:, :, max_q:].isinf().all() and sums.is_contiguous() and output.shape == grad_out.shape
    whole = [torch.tensor([0, size]) for size in (max_q, max_k)]
    found = backward(
        grad_out[0], query[0], key[0], value[0], output[0], sums[0, :, :max_q], *whole, max_q, max_k,
        mask == 2, _seed, scale,
    )  # fmt: skip
    return *(each.unsqueeze(0) for each in found), torch.empty(0)


def efficient_on_cpu() -> None:
    """Let memory-efficient attention take CPU tensors in this process."""
    for name, twin in (("forward", efficient_forward), ("backward", efficient_backward)):
        _LIBRARY.impl(f"_efficient_attention_{name}", twin, "CPU")


_LIBRARY = torch.library.Library("aten", "IMPL")


class DotProductAttention(nn.Module):
    """`transformer_engine.pytorch.DotProductAttention` 2.20 over packed documents (`thd`) on the CPU.

    It computes with torch's attention, document by document, and saves what cuDNN's does.
    """

    calls: ClassVar[list[Mapping[str, Any]]] = []
    """The arguments of all calls, of any module, with the shapes of the rows."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: tuple[int, int],
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        softmax_scale: float | None = None,
        layer_number: int | None = None,
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0
        # megatron-core builds attention twice, first without a scale, and keeps the second.
        self.scale = softmax_scale or kv_channels[0] ** -0.5
        self.heads, self.channels = num_attention_heads, kv_channels
        self.return_max_logit = return_max_logit

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        cu_seqlens_q_padded: Tensor,
        cu_seqlens_kv_padded: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
        pad_between_seqs: bool,
    ) -> Any:
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert query_layer.shape[1:] == (self.heads, self.channels[0]) == key_layer.shape[1:]
        assert value_layer.shape[1:] == (self.heads, self.channels[1])
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.shape == cu_seqlens_q_padded.shape
        self.calls.append({
            "rows": tuple(query_layer.shape),
            "documents": len(cu_seqlens_q) - 1,
            "longest": (max_seqlen_q, max_seqlen_kv),
            "max logits": self.return_max_logit,
            "padded": pad_between_seqs,
        })  # fmt: skip
        bounds = cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded
        output, largest = _Fused.apply(query_layer, key_layer, value_layer, self.scale, *bounds)
        output = output.view(len(output), -1)
        # Rounded to the type of the output.
        return (output, largest.to(output.dtype)) if self.return_max_logit else output


class _Fused(torch.autograd.Function):
    """Saves what `FusedAttnFunc` of Transformer Engine 2.20 saves."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, *bounds: Tensor) -> Any:
        output = query.new_zeros(*value.shape)
        statistics = query.new_empty(*query.shape[:2], 1, dtype=torch.float32)
        largest = query.new_full((query.shape[1],), -torch.inf, dtype=torch.float32)
        if not isinstance(query, torch._subclasses.FakeTensor):
            for rows in real_rows(bounds[0], bounds[2]):
                output[rows] = attend_document(query[rows], key[rows], value[rows], scale)
                logits = logits_of(query[rows], key[rows], scale, True)
                largest = torch.maximum(largest, logits.amax((1, 2)).float())
        seed = torch.empty(2, dtype=torch.int64, device=query.device)
        ctx.save_for_backward(query, key, value, output, *bounds, statistics, seed)
        ctx.scale = scale
        ctx.mark_non_differentiable(largest)
        return output, largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        *qkv, _output, real, _real, places, _places, _statistics, _seed = ctx.saved_tensors
        gradients = [torch.zeros_like(each) for each in qkv]
        for rows in real_rows(real, places):
            with torch.enable_grad():
                leaves = [each[rows].detach().requires_grad_() for each in qkv]
                attended = attend_document(*leaves, ctx.scale)
            for whole, part in zip(
                gradients, torch.autograd.grad(attended, leaves, gradient[rows]), strict=True
            ):
                whole[rows] = part
        return (*gradients, None, None, None, None, None)


def real_rows(real: Tensor, places: Tensor) -> Iterator[slice]:
    """Rows of the documents that are no padding."""
    for first, num_rows in zip(places.tolist(), real.diff().tolist(), strict=False):
        if num_rows:
            yield slice(first, first + num_rows)


def attend_document(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[L, H, V] of one document, with the CPU's kernel, which takes one head size."""
    padded = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    heads_first = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, padded))
    attended = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
    return attended[0, ..., : value.shape[-1]].transpose(0, 1)
