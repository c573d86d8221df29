"""What the largest logits cost on CUDA where they are computed apart from attention, counted."""

from dataclasses import dataclass

from k25_train.config.model import ModelConfig
from k25_train.model.max_logits_triton import KEY_BLOCK, QUERY_BLOCK


@dataclass(frozen=True, slots=True)
class LogitsCost:
    """Of one layer and micro-batch."""

    flops: int
    """Operations of the products, whole blocks."""
    attention_flops: int
    """Operations of attention's own products over what its mask leaves: two forward; five backward, where the
    logits are computed again."""
    memory_bytes: int
    """Memory that is written: a number for each block of queries and head."""

    @property
    def share(self) -> float:
        """Of attention's own operations."""
        return self.flops / self.attention_flops


def logits_cost(model: ModelConfig, lengths: list[int]) -> LogitsCost:
    """The cost over packed documents of these lengths."""
    first_keys = [
        start for start, length in zip(starts(lengths), lengths, strict=True) for _ in range(length)
    ]
    num_tokens, computed = len(first_keys), 0
    for first in range(0, num_tokens, QUERY_BLOCK):
        begin = first_keys[first] // KEY_BLOCK * KEY_BLOCK
        end = min(first + QUERY_BLOCK, num_tokens)
        computed += QUERY_BLOCK * (-(-(end - begin) // KEY_BLOCK) * KEY_BLOCK)
    allowed = sum(length * (length + 1) // 2 for length in lengths)
    heads, query, value = model.num_attention_heads, model.q_head_dim, model.v_head_dim
    return LogitsCost(
        flops=2 * computed * heads * query,
        attention_flops=2 * allowed * heads * (4 * query + 3 * value),
        memory_bytes=-(-num_tokens // QUERY_BLOCK) * heads * 4,
    )


def starts(lengths: list[int]) -> list[int]:
    """The first token of each document."""
    found = [0]
    for length in lengths[:-1]:
        found.append(found[-1] + length)
    return found
