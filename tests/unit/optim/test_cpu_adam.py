"""DeepSpeed's CPU Adam: what it computes, and what is said where it cannot be had.

In processes of their own: DeepSpeed, once imported, stays.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.project_sources import REPO

SIZES = (1, 7, 64, 1000, 12345)
"""Whole vectors of the kernel, its remainders, and both."""


def outcome(statements: Sequence[str], **environment: str) -> str:
    """What a new Python prints that imports the loader and runs `statements`."""
    code = "\n".join(["from k25_train.errors import ConfigError", *statements])
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


LOAD = (
    "from k25_train.optim.cpu_adam import load_cpu_adam",
    "try:",
    "    load_cpu_adam()",
    "except ConfigError as error:",
    "    print(error)",
)


def test_without_deepspeed_the_error_says_how_to_install_it() -> None:
    printed = outcome(["import sys; sys.modules['deepspeed'] = None", *LOAD])
    assert "optim.offload=cpu steps the optimizer with DeepSpeed, which cannot be imported" in printed
    assert "pip install 'k25-train[offload]'" in printed
    assert "optim.offload=none" in printed


def test_without_a_compiler_the_error_names_it(tmp_path: Path) -> None:
    printed = outcome(LOAD, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="no-such-compiler")
    assert "no-such-compiler, the C++ compiler, is not on PATH" in printed
    assert "apt install g++" in printed


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/bash\n[[ "$1" == -*version ]] && exec g++ "$@"\necho "fatal error: disk full"\nexit 1\n'
    )
    compiler.chmod(0o755)
    # What a process leaves behind that was killed while it compiled; torch would wait for it for ever.
    folder = tmp_path / "cache/cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    printed = outcome(LOAD, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    assert "could not be compiled here" in printed
    assert "fatal error: disk full" in printed


def train(optimizer: torch.optim.Optimizer, weights: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 20
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=generator) * 10.0 ** (-step % 5)
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()


def groups(weights: list[torch.Tensor]) -> list[dict]:
    common = {"betas": (0.9, 0.95), "eps": 1e-8}
    return [
        {"params": weights[:2], "weight_decay": 0.0, **common},
        {"params": weights[2:], "weight_decay": 0.1, **common},
    ]


def compare_with_float64() -> None:
    """Print the largest relative error of parameters after 20 steps: the kernel's, and torch's."""
    from k25_train.optim.cpu_adam import CpuAdamW

    start = [torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in SIZES]
    exact = [weight.double() for weight in start]
    train(torch.optim.AdamW(groups(exact)), exact)
    for build in (CpuAdamW, torch.optim.AdamW):
        weights = [weight.clone() for weight in start]
        train(build(groups(weights)), weights)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(weights, exact, strict=True)]
        print(max(errors))


@pytest.mark.slow
def test_the_kernel_is_as_exact_as_torchs_adamw() -> None:
    printed = outcome(["from tests.unit.optim import test_cpu_adam", "test_cpu_adam.compare_with_float64()"])
    kernel, torchs = map(float, printed.split())
    assert kernel <= 2 * torchs <= 1e-6
