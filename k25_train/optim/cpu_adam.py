"""AdamW on host memory by DeepSpeed's CPU Adam, a vectorised kernel that is compiled at first use."""

import contextlib
import fcntl
import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from k25_train.errors import ConfigError

_LOG = logging.getLogger(__name__)
_NAME = "cpu_adam"
_HANDLES = itertools.count()


class CpuAdamW(torch.optim.AdamW):
    """torch's AdamW, with its step computed by DeepSpeed's kernel on float32 tensors in host memory.

    State is torch's (`exp_avg`, `exp_avg_sq`, `step`), as are the parameter groups, which also count steps
    like the fused Adams of Apex and Transformer Engine do: checkpoints are interchangeable with all of
    these. Threads are OpenMP's: set OMP_NUM_THREADS to the rank's share of the host's cores.

    Bias correction is done here, in float64, and folded into rate, epsilon and decay:
    lr/c1 · m/(√v/√c2 + eps) = lr·√c2/c1 · m/(√v + eps·√c2). The kernel would accumulate powers of beta in
    float32 during a run, but compute them directly after a resume, whose steps then differ in the last bits.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Raises `ConfigError` as `load_cpu_adam` does."""
        super().__init__(groups)
        self._kernel = load_cpu_adam()
        self._handle = next(_HANDLES)
        is_adamw, talks = True, False
        self._kernel.create_adam(self._handle, 0.0, 0.0, 0.0, 0.0, 0.0, is_adamw, talks)
        weakref.finalize(self, self._kernel.destroy_adam, self._handle)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient, in place."""
        assert closure is None, "gradients are ready when the optimizer steps"
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                self._step_group(group, group["step"])

    def _step_group(self, group: dict[str, Any], step: int) -> None:
        """Step number `step` of a group's parameters."""
        # 1. Fold bias correction into the kernel's arguments.
        beta1, beta2 = group["betas"]
        root = math.sqrt(1 - beta2**step)
        rate = group["lr"] * root / (1 - beta1**step)
        # The kernel multiplies the decay by its rate, which is the corrected one.
        decay = group["weight_decay"] * group["lr"] / rate if rate else 0.0
        numbers = (self._handle, step, rate, beta1, beta2, group["eps"] * root, decay)
        # 2. One call of the kernel per shard.
        corrects_bias = False
        for master in group["params"]:
            state = self.state[master]
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["step"] = torch.tensor(float(step))
            moments = state["exp_avg"], state["exp_avg_sq"]
            self._kernel.adam_update(*numbers, corrects_bias, master, master.grad, *moments)


def load_cpu_adam() -> Any:
    """DeepSpeed's kernel, from the cache of torch's extensions or compiled into it.

    The cache is TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions. Compiling takes a minute or two, during
    which all other processes of a machine wait. Raises `ConfigError` if DeepSpeed, ninja or a C++ compiler
    is missing, or the compiler fails.
    """
    # 1. Import. Without DS_ACCELERATOR, DeepSpeed searches for accelerators, and warns if there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder
    except ImportError as error:
        raise ConfigError(
            f"optim.offload=cpu steps the optimizer with DeepSpeed, which cannot be imported ({error}): "
            "install it (`pip install 'k25-train[offload]'`), or keep the state on the device with "
            "optim.offload=none"
        ) from error
    # 2. Load or compile, one process at a time.
    try:
        with _alone_in_cache(), _own_commands_first():
            return CPUAdamBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        compiler = os.environ.get("CXX", "c++")
        cause = error if shutil.which(compiler) else f"{compiler}, the C++ compiler, is not on PATH"
        raise ConfigError(
            f"optim.offload=cpu needs DeepSpeed's CPU Adam, which could not be compiled here: {cause}\n"
            "install a C++ compiler (`apt install g++`; another than c++ is named by CXX) and ninja on every "
            "machine, or fill TORCH_EXTENSIONS_DIR on one of the same kind, or keep the state on the device "
            "with optim.offload=none"
        ) from error


@contextlib.contextmanager
def _alone_in_cache() -> Iterator[None]:
    """Lets one process at a time compile or load.

    torch has its own lock, a file that a process killed while compiling leaves behind, and that every later
    process then waits for, silently and forever. This lock ends with its holder, which may remove torch's.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(_NAME, verbose=False))
    with (folder / "k25_train.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{_NAME}.so").exists():
            _LOG.warning("compiling DeepSpeed's CPU Adam into %s, once: takes a minute or two", folder)
        yield


@contextlib.contextmanager
def _own_commands_first() -> Iterator[None]:
    """Lets torch find the ninja installed with this Python, even if PATH does not contain it."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
