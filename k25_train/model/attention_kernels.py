"""The implementations of attention over packed documents, one of which is chosen when the model is built.

    PerDocument          torch's scaled-dot-product attention, a call per document: CPU, float32 on CUDA
    Varlen               torch.nn.attention.varlen, one call for all documents: CUDA
    TransformerEngine    its DotProductAttention, one call for all documents: CUDA

Which one runs when is in `k25_train/plan/memory/kernels.py`. With a call per document in bfloat16, CUDA would
build a plan for every length that it has not met (cuDNN, about a second each, on the host), and documents
have thousands. FlashAttention has no plans. Transformer Engine's cuDNN has one per number of tokens and of
documents: here both are constant, the latter by empty documents at the end.

Shapes: T tokens of a micro-batch, L of a document, H heads, Q query/key head size, V value head size.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from k25_train.errors import ConfigError
from k25_train.model.documents import DocumentBounds
from k25_train.model.max_logits import largest_logits, max_logits_of_documents
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.activations.annotate import recomputed, saves

CAUSAL = (-1, 0)
"""`varlen_attn`'s window: all earlier keys, no later ones."""
OLDEST_TRANSFORMER_ENGINE = (2, 20)
"""What it does with packed documents and heads of two sizes was read there, and differs in earlier versions:
2.9 gives largest logits of packed documents by writing all logits to memory."""
NOT_TAKEN = ("NVTE_UNFUSED_ATTN", "NVTE_FLASH_ATTN")
"""Variables that switch off what Transformer Engine would take in place of cuDNN's attention."""
CUDNN_WITH_MAX_LOGITS = 92100
"""cuDNN from which Transformer Engine 2.20 gives each head's largest logit (`fused_attn.cpp`)."""


class HeadSizes(NamedTuple):
    """The heads of an attention layer."""

    num_heads: int
    query: int
    """Q, of queries and keys."""
    value: int
    """V."""


class DocumentAttend(Protocol):
    """Causal attention inside each document; nothing attends across documents."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds) -> Tensor:
        """Query and key [T, H, Q], value [T, H, V] -> [T, H * V].

        What padding gets, nobody reads, but it is finite, and so are its gradients: weight gradients have
        products of both with zeros.
        """

    def attend_and_measure(
        self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds
    ) -> tuple[Tensor, Tensor | None]:
        """In addition each head's largest softmax input, [H] float32, but for padding's. None or minus
        infinity if all is padding."""


@dataclass(frozen=True)
class PerDocument:
    """A call of torch's attention per document."""

    scale: float
    pads_values: bool
    """Whether the kernel takes one head size only, as the CPU's does: to pad costs less than not to fuse."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds) -> Tensor:
        """See `DocumentAttend`."""
        v_channels = value.shape[-1]
        if self.pads_values:
            value = padded(value, query.shape[-1])
        outputs = []
        pieces = (tensor.split(documents.lengths) for tensor in (query, key, value))
        for q_LHQ, k_LHQ, v_LHV in zip(*pieces, strict=True):
            q_1HLQ, k_1HLQ, v_1HLV = (each.transpose(0, 1).unsqueeze(0) for each in (q_LHQ, k_LHQ, v_LHV))
            with saves("attention.output"):
                outputs.append(
                    F.scaled_dot_product_attention(q_1HLQ, k_1HLQ, v_1HLV, is_causal=True, scale=self.scale)
                )
        return recomputed("attention.joined", partial(_join, v_channels), *outputs)

    def attend_and_measure(
        self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds
    ) -> tuple[Tensor, Tensor | None]:
        """See `DocumentAttend`."""
        largest = max_logits_of_documents(query, key, documents, self.scale)
        return self.attend(query, key, value, documents), largest


@dataclass(frozen=True)
class Varlen:
    """One call of FlashAttention 2, as torch 2.13 has it, which takes heads of one size, up to 256."""

    scale: float

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds) -> Tensor:
        """See `DocumentAttend`."""
        v_channels = value.shape[-1]
        value = padded(value, query.shape[-1])
        bounds, longest = documents.boundaries, documents.longest
        with saves("attention.output"):
            attended_THQ = varlen_attn(
                query, key, value, bounds, bounds, longest, longest, scale=self.scale, window_size=CAUSAL
            )
        # A pair of tensors only where that is asked for.
        assert isinstance(attended_THQ, Tensor)
        return recomputed("attention.joined", partial(_trim, v_channels), attended_THQ)

    def attend_and_measure(
        self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds
    ) -> tuple[Tensor, Tensor | None]:
        """See `DocumentAttend`."""
        keys = documents.first_keys, documents.last_keys
        largest = largest_logits(query.detach(), key.detach(), *keys, self.scale)
        return self.attend(query, key, value, documents), largest


@dataclass(frozen=True)
class TransformerEngine:
    """One call of Transformer Engine's attention, which on Hopper is cuDNN's and takes Q = 192, V = 128.

    Padding has no length there, only a place, so it costs nothing and its logits do not count. Its outputs
    and gradients are zeros: `fused_attn_fwd` and `fused_attn_bwd` fill them first.
    """

    scale: float
    max_document_tokens: int
    """Tokens of the longest document that there can be."""
    attention: Callable[..., Any]
    """A `DotProductAttention` that returns the output."""
    measuring: Callable[..., Any] | None
    """One that also returns largest logits; None if its cuDNN cannot."""
    constants: dict[str, Any] = field(
        default_factory=lambda: {
            "qkv_format": "thd",
            "attn_mask_type": "padding_causal",
            "pad_between_seqs": True,
        }
    )
    """Arguments that are the same in every call, so that Transformer Engine chooses its backend once."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds) -> Tensor:
        """See `DocumentAttend`. Its own output is what the next layer reads: nothing is joined."""
        with saves("attention.output"):
            return self.attention(query, key, value, **self._where(documents))

    def attend_and_measure(
        self, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds
    ) -> tuple[Tensor, Tensor | None]:
        """See `DocumentAttend`."""
        if self.measuring is None:
            keys = documents.first_keys, documents.last_keys
            largest = largest_logits(query.detach(), key.detach(), *keys, self.scale)
            return self.attend(query, key, value, documents), largest
        with saves("attention.output"):
            attended, largest = self.measuring(query, key, value, **self._where(documents))
        return attended, largest.detach().float()

    def _where(self, documents: DocumentBounds) -> dict[str, Any]:
        places, real = documents.table
        longest = max(self.max_document_tokens, documents.longest)
        return self.constants | {
            "cu_seqlens_q": real,
            "cu_seqlens_kv": real,
            "cu_seqlens_q_padded": places,
            "cu_seqlens_kv_padded": places,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }


def build_attention(
    kernel: AttentionKernel,
    heads: HeadSizes,
    scale: float,
    *,
    layer_number: int,
    max_document_tokens: int,
) -> DocumentAttend:
    """The attention of one layer. Raises `ConfigError` if the installed Transformer Engine is too old."""
    match kernel:
        case AttentionKernel.cpu | AttentionKernel.float32:
            return PerDocument(scale, kernel.pads_values)
        case AttentionKernel.varlen:
            return Varlen(scale)
        case AttentionKernel.transformer_engine:
            return _transformer_engine(heads, scale, layer_number, max_document_tokens)


def _transformer_engine(
    heads: HeadSizes, scale: float, layer_number: int, max_document_tokens: int
) -> TransformerEngine:
    import transformer_engine
    from transformer_engine.pytorch import DotProductAttention

    version = transformer_engine.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, OLDEST_TRANSFORMER_ENGINE))
        raise ConfigError(
            f"train.transformer_engine=true, but transformer_engine is {version}: attention over packed "
            f"documents needs {oldest} or later\n  -> install that, or set train.transformer_engine=false, "
            "with which torch's own attention runs"
        )
    # Where cuDNN's kernels do not fit, it should say so. It would write all logits to memory, or take
    # FlashAttention 3, whose rows of padding are as memory was: NaN there would reach weight gradients.
    for name in NOT_TAKEN:
        os.environ.setdefault(name, "0")
    build = partial(
        DotProductAttention,
        num_attention_heads=heads.num_heads,
        kv_channels=(heads.query, heads.value),
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
        layer_number=layer_number,
    )
    can_measure = (torch.backends.cudnn.version() or 0) >= CUDNN_WITH_MAX_LOGITS
    measuring = build(return_max_logit=True) if can_measure else None
    return TransformerEngine(scale, max_document_tokens, build(), measuring)


def padded(value: Tensor, width: int) -> Tensor:
    """Values [T, H, V] filled up with zeros to [T, H, width]; may be made again for the backward pass."""
    return recomputed("mla.up_proj", partial(F.pad, pad=(0, width - value.shape[-1])), value)


def _join(v_channels: int, *attended: Tensor) -> Tensor:
    """Outputs of all documents, each [1, H, L, V or more], one after another: [T, H * V]."""
    return torch.cat([each[0, ..., :v_channels].transpose(0, 1).flatten(1) for each in attended])


def _trim(v_channels: int, attended_THQ: Tensor) -> Tensor:
    """[T, H, V or more] -> [T, H * V]."""
    return attended_THQ[..., :v_channels].flatten(1)
