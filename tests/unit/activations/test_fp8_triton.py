"""The Triton kernels without a GPU: Triton's interpreter gives the twin's bits, and its compiler takes them.

Triton decides while it is imported whether it interprets, so each way has a process of its own.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.activations import fp8
from tests.helpers.fp8_reference import KINDS, hostile
from tests.helpers.triton_processes import bits, process


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with process({"TRITON_INTERPRET": "1"}) as pool:
        yield pool


def check_same_bits(rows: Tensor) -> None:
    """Both ways, against the twin, of float32 or bfloat16 [rows, hidden] on the CPU."""
    from parallel.activations import fp8_triton

    expected = fp8.compress(rows)
    values, scales = fp8_triton.compress_rows(rows)
    assert values.dtype == torch.float8_e4m3fn and values.shape == rows.shape
    assert torch.equal(bits(values), bits(expected.values))
    assert torch.equal(bits(scales), bits(expected.scales))
    back = fp8_triton.decompress_rows(values, scales, rows.dtype)
    assert back.dtype == rows.dtype
    assert torch.equal(bits(back), bits(fp8.decompress(expected)))


def interpret_hostile(kind: str, seed: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_same_bits(hostile(kind, seed, shape, dtype))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 127, 128, 129, 512, 700])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_same_bits_as_the_twin(
    interpreter: ProcessPoolExecutor, kind: str, seed: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    interpreter.submit(interpret_hostile, kind, seed, shape, dtype).result()


def interpret_every_bfloat16() -> None:
    """Every number of bfloat16, next to others of its size, and in a tile that has the scale 1."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    check_same_bits(every.view(-1, 512))
    in_scale_one = every.view(-1, 64).float()
    in_scale_one = torch.where(in_scale_one.abs() > 448, 0, in_scale_one)
    in_scale_one = torch.cat([in_scale_one, torch.full_like(in_scale_one, 448)], 1)
    assert (fp8.compress(in_scale_one).scales == 1).all()
    check_same_bits(in_scale_one.bfloat16().view(-1, 512))


def test_every_bfloat16(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpret_every_bfloat16).result()


def interpret_every_code() -> None:
    from parallel.activations import fp8_triton

    codes = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
    values = codes.view(torch.float8_e4m3fn)
    scales = torch.tensor([2.0**-116, 3e-30, 0.1, 1, 1.1, 7, 1e30, 7.5e35])[:, None].expand(8, 2).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        expected = fp8.decompress(fp8.Fp8Tensor(values, scales, codes.shape, dtype))
        assert torch.equal(bits(fp8_triton.decompress_rows(values, scales, dtype)), bits(expected))


def test_every_code_is_read(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpret_every_code).result()


def interpret_views() -> None:
    wide = torch.randn(9, 600, generator=torch.Generator().manual_seed(0))
    for view in (wide[:, 300:], wide[::2, 1:130], wide[:, :20].T, wide[:, ::5], wide[:1].expand(9, 600)):
        check_same_bits(view)
        check_same_bits(view.bfloat16() if view.is_contiguous() else view.contiguous().bfloat16()[:, 1:])


def test_rows_that_are_apart(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpret_views).result()


def compile_for_h800() -> list[str]:
    """PTX of both kernels for bfloat16 on sm_90, with sizes that are multiples of 16 as the model's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from parallel.activations import fp8_triton

    pointers = {"words": "*i16", "codes": "*u8", "scales": "*fp32"}
    found = []
    for kernel in (fp8_triton._compress_kernel, fp8_triton._decompress_kernel):
        signature = {name: pointers.get(name, "i32") for name in kernel.arg_names} | {
            "is_bfloat16": "constexpr"
        }
        even = [name for name in kernel.arg_names if name in (*pointers, "hidden", "row_stride")]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
        source = ASTSource(kernel, signature, {"is_bfloat16": True}, attributes)
        found.append(triton.compile(source, GPUTarget("cuda", 90, 32), fp8_triton.COMPILE_OPTIONS).asm["ptx"])
    return found


def test_they_compile_unfused_to_accesses_of_16_bytes(tmp_path: Path) -> None:
    with process({"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}) as pool:
        compress, decompress = pool.submit(compile_for_h800).result()
    assert "fma" not in compress + decompress and "div.full" not in compress
    # 32 elements a thread, each read once: of two bytes and of one.
    assert compress.count("ld.global.v4.b32") == 4 and compress.count("ld.global") == 4
    assert compress.count("st.global.v4.b32") == 2
    assert decompress.count("ld.global.v4.b32") == 2 and decompress.count("st.global.v4.b32") == 4
