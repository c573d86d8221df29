"""Attention to several blocks of keys, put together from attention to each.

Softmax over all keys is the mean of softmaxes over blocks, weighted by the sums of the exponentials of each
block's logits. Kernels give the logarithms of these sums (source: Milakov and Gimelshein, arXiv 1805.02867;
for whole blocks Liu et al., arXiv 2310.01889).

Shapes: q queries, H heads, V value head size.
"""

import torch
from torch import Tensor

from parallel.context.blocks import KeyBlock


def merged(output_a: Tensor, logsum_a: Tensor, output_b: Tensor, logsum_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both: outputs [q, H, V] and logarithms of sums [q, H], in float32.

    A sum may be 0 (minus infinity) in one of both.
    """
    logsum = torch.logaddexp(logsum_a, logsum_b)
    weight_a, weight_b = (torch.exp(each - logsum).unsqueeze(-1) for each in (logsum_a, logsum_b))
    return output_a * weight_a + output_b * weight_b, logsum


class MergedAttention:
    """A rank's attention to the blocks so far, in float32 from the second on."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._output: Tensor | None = None
        self._logsum: Tensor | None = None

    def add(self, output: Tensor, logsum: Tensor, block: KeyBlock) -> None:
        """Add attention to a block: output [q, H, V] and logarithms of sums [q, H] float32 of its queries."""
        if self._output is None or self._logsum is None:
            if block.num_queries == self._num_tokens:
                self._output, self._logsum = output, logsum
                return
            # Padding attends to nothing.
            self._output = output.new_zeros(self._num_tokens, *output.shape[1:])
            self._logsum = logsum.new_full((self._num_tokens, logsum.shape[1]), -torch.inf)
            self._output[block.rows], self._logsum[block.rows] = output, logsum
            return
        self._output = self._output.float()
        rows = block.rows
        self._output[rows], self._logsum[rows] = merged(
            self._output[rows], self._logsum[rows], output.float(), logsum
        )

    def result(self, like: Tensor, value_size: int) -> tuple[Tensor, Tensor]:
        """Output [t, H, V] in the type of the queries `like` [t, H, Q], and logarithms [t, H] float32."""
        if self._output is None or self._logsum is None:
            shape = like.shape[:2]
            return like.new_zeros(*shape, value_size), torch.full_like(like[..., 0], -torch.inf).float()
        # It is saved: a view would keep what a kernel has filled values up with.
        return self._output.to(like.dtype).contiguous(), self._logsum
