"""Seconds of a kernel: what no device can be faster than, and what published benchmarks measured."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.compose.resolve import CONF_DIR, compose
from k25_train.config.rates import RatesConfig
from k25_train.plan.kernels.kernel import Attention, Kernel, Moved, Precision, Product
from k25_train.plan.kernels.seconds import kernel_s, kernels_s, launch_s
from k25_train.units import GB

DEVICES = sorted(path.stem for path in (CONF_DIR / "device").glob("*.yaml"))
RATES = {
    name: compose(
        ["experiment=smoke", f"device={name}", "cluster.device=cpu", "cluster.rates.calibration.kernels=1"]
    ).cluster.rates
    for name in DEVICES
}
H800, CPU = RATES["h800"], RATES["cpu"]
FLOAT32, BFLOAT16, FP8 = Precision.float32, Precision.bfloat16, Precision.fp8
TILES = st.integers(min_value=1, max_value=40).map(lambda tiles: 128 * tiles)
PRECISIONS = st.sampled_from([FLOAT32, BFLOAT16, FP8])

# Groups, m, n, k and TFLOPS on an H800 in FP8. Source: DeepGEMM's README of 2025-03-25 (commit 55ab91f).
FP8_PRODUCTS = [
    (1, 4096, 2112, 7168, 1009),
    (1, 4096, 24576, 1536, 1125),
    (1, 4096, 32768, 512, 751),
    (1, 4096, 7168, 16384, 1426),
    (1, 4096, 4096, 7168, 1265),
    (1, 4096, 7168, 2048, 1168),
    (4, 8192, 4096, 7168, 1346),
    (4, 8192, 7168, 2048, 1214),
    (8, 4096, 4096, 7168, 1346),
    (8, 4096, 7168, 2048, 1214),
    (1, 1024, 4096, 7168, 1233),
    (2, 512, 4096, 7168, 1040),
    (2, 512, 7168, 2048, 916),
    (4, 256, 4096, 7168, 932),
    (4, 256, 7168, 2048, 815),
]
# The same on an H100 in bfloat16. Sources: Transformer Engine's PR 2045, version 2.7 with cuBLAS and with
# CUTLASS; stas00/ml-engineering, the best shape of all.
BFLOAT16_PRODUCTS = [
    (8, 4096, 768, 2048, 628),
    (8, 4096, 768, 2048, 650),
    (16, 2048, 768, 2048, 554),
    (16, 2048, 768, 2048, 637),
    (1, 2048, 2048, 13312, 794.5),
]
# Device, precision, widths of heads, tokens of a document, TFLOPS forward and backward, causal.
# Source: NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training/results; cuDNN 9.19 on an H200, of 2026-02,
# and 9.22 on the others, MXFP8 among it, of 2026-04.
ATTENTION = [
    ("h200", BFLOAT16, 128, 2048, 484, 370), ("h200", BFLOAT16, 128, 4096, 591, 474),
    ("h200", BFLOAT16, 128, 8192, 644, 541), ("h200", BFLOAT16, 128, 16384, 673, 579),
    ("gb200", BFLOAT16, 192, 2048, 1072, 846), ("gb200", BFLOAT16, 192, 4096, 1406, 1057),
    ("gb200", BFLOAT16, 192, 8192, 1585, 1193), ("gb200", BFLOAT16, 192, 16384, 1678, 1134),
    ("gb200", FP8, 192, 4096, 1925, 1364), ("gb200", FP8, 192, 8192, 2219, 1494),
    ("gb300", BFLOAT16, 192, 2048, 1285, 914), ("gb300", BFLOAT16, 192, 4096, 1590, 1143),
    ("gb300", BFLOAT16, 192, 8192, 1825, 1291), ("gb300", BFLOAT16, 192, 16384, 1967, 1302),
    ("gb300", FP8, 192, 4096, 2517, 1522), ("gb300", FP8, 192, 8192, 2829, 1780),
]  # fmt: skip


def tflops(kernel: Kernel, rates: RatesConfig, precision: Precision) -> float:
    return kernel.flops / kernel_s(kernel, rates, precision) / 1e12


@pytest.mark.parametrize("shape", FP8_PRODUCTS, ids=str)
def test_products_in_fp8_take_what_deepgemm_measured(shape: tuple[int, int, int, int, float]) -> None:
    groups, m, n, k, measured = shape
    product = Product("product", m, n, k, count=groups)
    assert tflops(product, H800, FP8) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("shape", BFLOAT16_PRODUCTS, ids=str)
def test_products_in_bfloat16_take_what_was_measured(shape: tuple[int, int, int, int, float]) -> None:
    groups, m, n, k, measured = shape
    product = Product("product", m, n, k, count=groups)
    assert tflops(product, H800, BFLOAT16) == pytest.approx(measured, rel=0.15)


def attention(length: int, *, width: int = 128, is_backward: bool) -> Attention:
    """Causal, 16,384 tokens in documents of one length, 64 heads."""
    tokens = 16384
    return Attention("attention", tokens * length / 2, tokens, 64, width, 128, is_backward=is_backward)


@pytest.mark.parametrize(("device", "precision", "width", "length", "forward", "backward"), ATTENTION)
def test_attention_takes_what_cudnn_measured(
    device: str, precision: Precision, width: int, length: int, forward: float, backward: float
) -> None:
    for is_backward, measured in ((False, forward), (True, backward)):
        kernel = attention(length, width=width, is_backward=is_backward)
        computed = kernel.computed_flops / kernel_s(kernel, RATES[device], precision) / 1e12
        assert computed == pytest.approx(measured, rel=0.15)


@settings(max_examples=100, deadline=None)
@given(m=TILES, n=TILES, k=TILES, count=st.integers(1, 64), precision=PRECISIONS)
def test_more_to_compute_takes_longer(m: int, n: int, k: int, count: int, precision: Precision) -> None:
    product = Product("product", m, n, k, count=count)
    seconds = kernel_s(product, H800, precision)
    grown = (
        replace(product, m=m + 128), replace(product, n=n + 128), replace(product, k=k + 128),
        replace(product, count=count + 1), replace(product, accumulates=True),
    )  # fmt: skip
    assert all(kernel_s(larger, H800, precision) >= seconds for larger in grown)
    assert kernel_s(replace(product, k=2 * k), H800, precision) > seconds


@settings(max_examples=100, deadline=None)
@given(m=TILES, n=TILES, k=TILES, count=st.integers(1, 64), precision=PRECISIONS)
def test_nothing_is_faster_than_the_data_sheet(
    m: int, n: int, k: int, count: int, precision: Precision
) -> None:
    peak = {FLOAT32: H800.float32_tflops, BFLOAT16: H800.bf16_tflops, FP8: H800.fp8_tflops}[precision]
    assert peak is not None and H800.memory_gb_per_s is not None
    kernels: tuple[Kernel, ...] = (
        Product("product", m, n, k, count=count),
        Attention("attention", m * n / 2, m, 16, 192, 128, is_backward=k > 2560),
        Moved("moved", float(m * n)),
    )
    for kernel in kernels:
        seconds = kernel_s(kernel, H800, precision)
        assert seconds > kernel.flops / (1e12 * peak)
        assert seconds > kernel.num_bytes(precision) / (GB * H800.memory_gb_per_s)


def test_either_side_of_the_roof_limits() -> None:
    """Faster memory does little for a large product, faster arithmetic little for a thin one."""
    assert H800.memory_gb_per_s is not None
    fast_memory = replace(H800, memory_gb_per_s=2 * H800.memory_gb_per_s)
    fast_products = replace(H800, bf16_tflops=2 * H800.bf16_tflops)
    large, thin = Product("large", 16384, 8192, 8192), Product("thin", 32, 16384, 16384)
    for product, small, much in ((large, fast_memory, fast_products), (thin, fast_products, fast_memory)):
        seconds = kernel_s(product, H800, BFLOAT16)
        assert seconds / kernel_s(product, small, BFLOAT16) < 1.2
        assert seconds / kernel_s(product, much, BFLOAT16) > 1.6


def test_a_wave_that_is_not_full_takes_as_long_as_a_full_one() -> None:
    """12 times 11 tiles are as many as an H800 has multiprocessors."""
    full, not_full, two = (Product("product", 128 * rows, 256 * 11, 8192) for rows in (12, 10, 13))
    seconds = kernel_s(full, H800, BFLOAT16)
    assert kernel_s(not_full, H800, BFLOAT16) > 0.95 * seconds
    assert kernel_s(two, H800, BFLOAT16) > 1.15 * seconds


def test_a_tile_that_is_not_full_takes_as_long_as_a_full_one() -> None:
    one, full, next_tile = (kernel_s(Product("product", m, 65536, 8192), H800, BFLOAT16) for m in (1, 64, 65))
    assert 0.95 * full < one < full
    assert next_tile > 1.05 * full


def test_the_smallest_kernels_take_microseconds() -> None:
    assert kernel_s(Product("product", 1, 1, 1), H800, BFLOAT16) > 3e-6
    assert kernel_s(Moved("moved", 1, num_launches=5), H800, BFLOAT16) > 5e-6


def test_attention_over_very_short_documents_is_bound_by_memory() -> None:
    seconds = {
        rate: kernel_s(
            Attention("attention", 1e6, 1e6, 16, 192, 128), replace(H800, memory_gb_per_s=rate), BFLOAT16
        )
        for rate in (2000.0, 3000.0)
    }
    assert seconds[2000.0] == pytest.approx(1.5 * seconds[3000.0], rel=0.01)


def test_short_documents_are_less_efficient() -> None:
    for is_backward in (False, True):
        rates = [
            tflops(attention(length, is_backward=is_backward), H800, BFLOAT16)
            for length in (128, 512, 4096, 65536)
        ]
        assert rates == sorted(rates)
        assert rates[0] < 0.5 * rates[-1]


def test_on_the_cpu_a_kernel_takes_its_flops_over_the_rate() -> None:
    kernels: tuple[Kernel, ...] = (
        Product("product", 100, 30, 70, count=3, accumulates=True),
        attention(100, is_backward=False),
        attention(100, is_backward=True),
        Moved("moved", 1e9, num_launches=7),
    )
    for kernel in kernels:
        assert kernel_s(kernel, CPU, FLOAT32) == kernel.flops / (1e12 * CPU.float32_tflops)
    fast = replace(CPU, bf16_tflops=2 * CPU.float32_tflops)
    assert kernel_s(kernels[0], fast, BFLOAT16) == kernel_s(kernels[0], CPU, FLOAT32) / 2
    assert launch_s(kernels, CPU) == 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_calibration_scales_every_kernel(device: str) -> None:
    rates = RATES[device]
    slower = replace(rates, calibration=replace(rates.calibration, kernels=1.25))
    kernels: tuple[Kernel, ...] = (
        Product("product", 4096, 7168, 2048, count=8),
        attention(4096, is_backward=True),
        Moved("moved", 1e9),
    )
    for precision in (BFLOAT16, FP8):
        scaled = kernels_s(kernels, slower, precision)
        assert scaled == pytest.approx(1.25 * kernels_s(kernels, rates, precision))
    # Faster in FP8 wherever there is FP8.
    product = kernels[0]
    in_fp8, in_bfloat16 = (kernel_s(product, rates, precision) for precision in (FP8, BFLOAT16))
    assert in_fp8 < 0.7 * in_bfloat16 if rates.fp8_tflops else in_fp8 == in_bfloat16
