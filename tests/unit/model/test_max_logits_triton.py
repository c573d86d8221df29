"""Largest logits in one launch without a GPU: Triton's interpreter finds them, its compiler takes the kernel.

Triton decides while it is imported whether it interprets, so each way has a process of its own. In the
interpreter, products of bfloat16 are those of its bits: float16 stands for it.
"""

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one": ((70,), ()),
    "many": ((20, 1, 33, 10, 70, 7), (2, 5)),
    "of one token": ((1,) * 40, (7,)),
    "negative": ((70,), ()),
    "padding first": ((40, 3), (0,)),
    "padding alone": ((40, 3), (0, 1)),
}
HEADS = ((24, torch.float32), (192, torch.float16))
"""Head sizes, the first one's for all cases."""
BLOCK = 32
"""Rows and keys of a block, so that documents have several."""


def set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def in_process[T](variables: dict[str, str], function: Callable[[], T]) -> T:
    """Call a function in a process that imports Triton under these environment variables."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=set_environment, initargs=(variables,)) as pool:
        return pool.submit(function).result()


def interpret() -> dict[str, float]:
    """Case -> the largest difference from the block-wise computation; infinite differences are equal ones."""
    from k25_train.model import max_logits_triton
    from k25_train.model.documents import DocumentBounds
    from k25_train.model.max_logits import max_logits_of_documents

    max_logits_triton.QUERY_BLOCK = max_logits_triton.KEY_BLOCK = BLOCK
    found = {}
    for name, (lengths, padding) in CASES.items():
        for head_size, dtype in HEADS if name == "many" else HEADS[:1]:
            torch.manual_seed(head_size)
            query, key = (torch.randn(sum(lengths), 3, head_size).to(dtype) for _ in range(2))
            documents = DocumentBounds.of(lengths, torch.device("cpu"), padding)
            # What no real token attends to: padding, and a later token of the same block.
            key[documents.first_keys == sum(lengths)] = math.nan
            query[0] = key[lengths[0] - 1] = 4.0
            if name == "negative":
                query, key = query.abs(), -key.abs()
            result = max_logits_triton.launch(query, key, documents.first_keys, documents.last_keys, 0.3)
            expected = max_logits_of_documents(query.float(), key.float(), documents, 0.3)
            if expected is None:
                expected = torch.full_like(result, -torch.inf)
            same = result == expected
            found[f"{name}, {head_size}"] = float((result - expected).masked_fill(same, 0.0).abs().max())
    found |= shared()
    # A NaN that counts is not lost in a maximum.
    query[1, 2] = math.nan
    every = DocumentBounds.of((sum(lengths),), torch.device("cpu"))
    ones, keys = torch.ones_like(query), (every.first_keys, every.last_keys)
    found["NaN"] = float(max_logits_triton.launch(query, ones, *keys, 1.0)[2])
    return found


def shared() -> dict[str, float]:
    """The same for blocks of keys of ranks that share documents."""
    from k25_train.model import max_logits_triton
    from k25_train.model.context_kernels import CpuBlocks
    from parallel.context.blocks import ContextShard
    from parallel.context.plan import plan_context

    plan, found = plan_context((150, 3, 60, 20, 23), (3,), 2), {}
    for order in (((0, 1),), ((1,), (0,))):
        for block in ContextShard(plan, 1, torch.device("cpu")).blocks(order):
            query, key = (torch.randn(size, 3, 24) for size in (block.num_queries, len(block.keys)))
            # Later keys of the queries' own, and those of other documents, do not count.
            key[-1] = 4.0
            query[0] = 4.0
            result = max_logits_triton.launch(query, key, *block.first_and_last_keys, 0.3)
            expected = CpuBlocks(0.3).largest_logits(query, key, block)
            found[f"shared, {block.sources}"] = float((result - expected).abs().max())
    return found


def test_the_interpreter_finds_the_largest_logits() -> None:
    found = in_process({"TRITON_INTERPRET": "1"}, interpret)
    assert found.pop("NaN") == math.inf
    assert max(found.values()) < 1e-4, found


def compile_for_h800() -> dict[str, Any]:
    """PTX and shared memory of the kernel for Kimi K2.5's heads in bfloat16 on sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from k25_train.model import max_logits_triton as module

    kernel = module.max_logits_kernel
    whole, rest = module.head_parts(192)
    constants = {
        "head_size": 192,
        "whole": whole,
        "rest": rest,
        "query_block": module.QUERY_BLOCK,
        "key_block": module.KEY_BLOCK,
    }
    pointers = {"query": "*bf16", "key": "*bf16", "first_keys": "*i32", "last_keys": "*i32"}
    pointers["maxima"] = "*fp32"
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    even = (*pointers, "query_row", "query_head", "key_row", "key_head", "num_queries", "num_keys")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), module.COMPILE_OPTIONS)
    return {"parts": (whole, rest), "ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}


@pytest.mark.slow
def test_it_compiles_to_hoppers_matrix_products(tmp_path: Path) -> None:
    found = in_process({"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}, compile_for_h800)
    assert found["parts"] == (128, 64)
    assert "wgmma.mma_async" in found["ptx"] and "cp.async" in found["ptx"]
    assert "st.local" not in found["ptx"], "registers are spilled"
    # An SM has 227 KiB for a block.
    assert found["shared"] <= 227 << 10


def test_shapes_without_memory_go_through_it() -> None:
    from k25_train.model.max_logits import largest_logits

    with FakeTensorMode():
        rows = torch.empty(4096, 64, 192, dtype=torch.bfloat16, device="cuda")
        first_keys = torch.empty(4096, dtype=torch.int32, device="cuda")
        found = largest_logits(rows, rows, first_keys, first_keys, 0.1)
    assert found.shape == (64,) and found.dtype is torch.float32 and found.is_cuda
