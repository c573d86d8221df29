"""What kernels keep for their backward pass, where devices differ; torch-free."""

from dataclasses import dataclass

from k25_train.config.cluster import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What operations keep for their backward pass, where devices differ."""

    norm_is_fused: bool
    """Whether RMSNorm is one kernel, which keeps its input. Otherwise it is made of operations on float32,
    which keep that input in float32 and what it is normalised to. Both keep a float32 a row."""
    pads_values: bool
    """Whether the attention kernel takes queries, keys and values of one width only."""
    attention_rows: int
    """Rows for which the attention kernel keeps the logarithm of a sum are filled up to a multiple of it."""
    attention_seeds: int
    """Scalars, 8 bytes each, that the attention kernel keeps for dropout, whether there is any or not."""


KERNELS = {
    Device.cpu: Kernels(norm_is_fused=False, pads_values=True, attention_rows=1, attention_seeds=0),
    Device.cuda: Kernels(norm_is_fused=True, pads_values=False, attention_rows=32, attention_seeds=2),
}
"""By device. CUDA's are from reading torch 2.13, and have not been measured on a GPU: `_fused_rms_norm` (what
Transformer Engine's keeps is the same) and `_scaled_dot_product_efficient_attention`, the kernel for values
narrower than keys (cuDNN's keeps no more)."""
