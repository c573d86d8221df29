"""What each kernel of attention saves for its backward pass; torch-free.

Shapes: T tokens of a micro-batch, L of a document, H heads, V width of a head's output, N documents.
"""

from collections.abc import Iterator

from k25_train.config.model import ModelConfig
from k25_train.plan.memory.kernels import AttentionKernel
from k25_train.plan.memory.saved_tensor import BOUND_BYTES, FLOAT_BYTES, INDEX_BYTES, SavedTensor, exact
from k25_train.plan.pass_sizes import PassSizes, document_room

NAME = "attention.output"
FLOAT32_ROWS = 32
"""Rows for which torch's memory-efficient attention keeps a sum's logarithm are filled up to a multiple."""


def attention_outputs(
    kernel: AttentionKernel, sizes: PassSizes, heads: int, value_width: int, element_bytes: int
) -> Iterator[SavedTensor]:
    """The output, with the logarithm of a sum for each row, and what the kernel keeps for a dropout, whether
    there is any or not. `value_width` is V as the kernel has it, padded or not."""
    if kernel in (AttentionKernel.cpu, AttentionKernel.float32):
        on_cuda = kernel is AttentionKernel.float32
        for length in sizes.documents:
            rows = -(-length // FLOAT32_ROWS) * FLOAT32_ROWS if on_cuda else length
            yield exact(NAME, (1, heads, rows), FLOAT_BYTES)
            yield exact(NAME, (1, heads, length, value_width), element_bytes)
            for _ in range(2 if on_cuda else 0):
                yield exact(NAME, (), INDEX_BYTES)
        return
    of_rows = (heads, sizes.tokens) if kernel is AttentionKernel.varlen else (sizes.tokens, heads, 1)
    yield exact(NAME, (sizes.tokens, heads, value_width), element_bytes)
    yield exact(NAME, of_rows, FLOAT_BYTES)
    yield exact(NAME, (2,), INDEX_BYTES)


def document_boundaries(kernel: AttentionKernel, sizes: PassSizes) -> Iterator[SavedTensor]:
    """Where documents begin and end, which all layers of a chunk save once (`model/documents.py`)."""
    num_documents = len(sizes.documents)
    room = document_room(num_documents)
    memory_bytes = 2 * (room + 1) * BOUND_BYTES
    if kernel is AttentionKernel.varlen:
        yield exact(NAME, (num_documents + 1,), BOUND_BYTES, memory_bytes=memory_bytes)
    elif kernel is AttentionKernel.transformer_engine:
        yield exact(NAME, (room + 1,), BOUND_BYTES, memory_bytes=memory_bytes)


def normed_heads(model: ModelConfig, tokens: int, element_bytes: int) -> Iterator[SavedTensor]:
    """Norms of each head's queries and keys in grouped-query attention, whose outputs are only rotated, for
    which nothing is saved. Source: Qwen3MoeAttention of transformers; nothing of ours computes it, so this
    list is held against no run."""
    for heads in (model.num_attention_heads, model.num_key_value_heads or 1):
        yield exact("mla.latent", (tokens, heads, model.q_head_dim), element_bytes)
        yield exact("mla.latent", (tokens, heads, 1), FLOAT_BYTES)
