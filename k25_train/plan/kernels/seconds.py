"""How long a kernel takes on a device: the longer of its arithmetic and its memory traffic; torch-free.

A product is cut into tiles, which the streaming multiprocessors compute in waves: a last wave that is not
full takes as long as a full one. A tile's result is written while nothing else runs on its multiprocessor, so
short sums reach less of the rate than long ones, and small tiles reload their factors more often. The tiling
is the fastest one, as libraries choose it. Constants are what DeepGEMM's and cuDNN's published tables
amount to (`tests/unit/plan/test_kernel_seconds.py`); one factor per device, `rates.calibration.kernels`,
corrects them all.

With one multiprocessor (`conf/device/cpu.yaml`) no tiles are counted, and a kernel takes its FLOPs over the
rate.
"""

import math
from collections.abc import Iterable

from k25_train.config.rates import RatesConfig
from k25_train.plan.kernels.kernel import Attention, Kernel, Moved, Precision, Product
from k25_train.units import GB

TILINGS = (
    (128, 256, 1.0),
    (256, 128, 1.0),
    (128, 128, 0.93),
    (64, 256, 0.85),
    (64, 128, 0.75),
    (64, 64, 0.6),
)
"""Rows and columns of a tile, and the share of the largest tiles' rate that it reaches."""
TILE_START_S = 1e-6
"""Before a tile's first products have their factors."""
WRITTEN_ALONE = 0.5
"""Share of a tile's result that is written while its multiprocessor computes nothing."""
MEMORY_SHARE = 0.85
"""Share of the memory's rate that products reach, which read in large pieces ahead of time."""
START_S = 1e-6
"""Before and after a product, while not all multiprocessors are busy."""
FP8_ATTENTION = (1.27, 0.65), (0.92, 1.5)
"""Forward and backward: how many times faster attention is in FP8 with heads of 128, and the power with which
that grows with width. Source: cudnn-frontend's benchmarks, MXFP8 over bfloat16: 1.2 to 1.4 and 0.9 to 1.0
for Llama's heads of 128, 1.4 to 1.6 and 1.2 to 1.4 for DeepSeek-V3's of 192 and 128."""


def kernel_s(kernel: Kernel, rates: RatesConfig, precision: Precision) -> float:
    """Seconds of a kernel that runs alone, with the gap before the next.

    Args:
        kernel: what is computed.
        rates: of the device.
        precision: of a product's factors, or in which attention computes.
    """
    memory_s = moved_s(kernel.num_bytes(precision), rates)
    if isinstance(kernel, Product):
        seconds = _product_s(kernel, rates, precision)
    elif isinstance(kernel, Attention):
        seconds = max(_attention_s(kernel, rates, precision), memory_s)
    else:
        seconds = memory_s
    gaps = kernel.num_launches if isinstance(kernel, Moved) else 1
    return rates.calibration.kernels * (seconds + gaps * rates.gap_us / 1e6)


def kernels_s(kernels: Iterable[Kernel], rates: RatesConfig, precision: Precision) -> float:
    """Seconds of kernels one after another."""
    return sum(kernel_s(kernel, rates, precision) for kernel in kernels)


def launch_s(kernels: Iterable[Kernel], rates: RatesConfig) -> float:
    """Seconds in which the host launches these kernels."""
    return sum(kernel.num_launches for kernel in kernels) * rates.launch_us / 1e6


def moved_s(num_bytes: float, rates: RatesConfig) -> float:
    """Seconds in which the device's memory reads and writes so many bytes; not calibrated."""
    if rates.memory_gb_per_s is None:
        return 0.0
    return num_bytes / (GB * rates.memory_gb_per_s * rates.memory_efficiency)


def flops_per_s(rates: RatesConfig, precision: Precision) -> float:
    """Operations a second of large products."""
    if precision is Precision.float32:
        return 1e12 * rates.float32_tflops * rates.gemm_efficiency
    if precision is Precision.fp8 and rates.fp8_tflops is not None:
        return 1e12 * rates.fp8_tflops * rates.fp8_efficiency
    return 1e12 * rates.bf16_tflops * rates.gemm_efficiency


def _product_s(product: Product, rates: RatesConfig, precision: Precision) -> float:
    """The smooth roofline: where arithmetic and memory traffic take equally long, they hinder each other."""
    rate = flops_per_s(rates, precision)
    memory_s = _streamed_s(product.num_bytes(precision), rates)
    if rates.num_sms == 1:
        return max(product.flops / rate, memory_s)
    of_one_sm = rate / rates.num_sms
    written_s = WRITTEN_ALONE * _streamed_s(precision.result_bytes, rates) * rates.num_sms
    shortest = math.inf
    for rows, columns, share in TILINGS:
        tiles = math.ceil(product.m / rows) * math.ceil(product.n / columns) * product.count
        tile_s = TILE_START_S + rows * columns * (2 * product.k / (of_one_sm * share) + written_s)
        shortest = min(shortest, math.ceil(tiles / rates.num_sms) * tile_s)
    return START_S + math.hypot(shortest, memory_s)


def _streamed_s(num_bytes: float, rates: RatesConfig) -> float:
    """Seconds in which products read and write so many bytes."""
    return moved_s(num_bytes, rates) * rates.memory_efficiency / max(rates.memory_efficiency, MEMORY_SHARE)


def _attention_s(attention: Attention, rates: RatesConfig, precision: Precision) -> float:
    peak = rates.float32_tflops if precision is Precision.float32 else rates.bf16_tflops
    rate = 1e12 * peak
    if precision is Precision.fp8:
        gain, power = FP8_ATTENTION[attention.is_backward]
        rate *= gain * ((attention.qk_width + attention.v_width) / 256) ** power
    rate *= rates.attention_backward_efficiency if attention.is_backward else rates.attention_efficiency
    rate *= attention.rate_share
    if rates.num_sms == 1:
        return attention.flops / rate
    computed = attention.computed_flops + rates.attention_half_keys * _per_key(attention)
    return computed / rate


def _per_key(attention: Attention) -> float:
    """Operations of one key for each query."""
    return attention.computed_flops * attention.tokens / attention.pairs if attention.pairs else 0.0
