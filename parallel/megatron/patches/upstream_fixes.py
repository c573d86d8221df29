"""Fixes of megatron-core 0.19.2, each small, named after what it fixes, and covered by a test.

`tests/unit/megatron/test_seam.py` shows the fault of each without its fix, so that an upgrade which
fixes one upstream makes that test fail, and ours can be removed.
"""

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parallel.megatron.patches.singleton_groups import keep_singleton_groups_local

_INSTALLED = False


def install(*, on_cpu: bool) -> None:
    """Apply the fixes to this process's megatron-core. Idempotent."""
    global _INSTALLED
    if _INSTALLED:
        return
    _INSTALLED = True
    # Compilation first, before other modules of megatron-core are imported.
    if on_cpu:
        do_without_triton()
        switch_off_compilation()
        return_split_sizes_as_numpy()
        accept_cpu_parameters_in_optimizers()
        copy_rng_state_from_cpu()
        keep_singleton_groups_local()


class _Refusal:
    """A kernel that is not there: called as it is, or indexed by its grid first."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this kernel of megatron-core or emerging-optimizers needs triton, for a GPU")

    def __getitem__(self, _: Any) -> Any:
        return self


_WITHOUT_TRITON: dict[str, dict[str, Any]] = {
    "megatron.core.transformer.moe.ops.paged_stash": {
        "GLOBAL_BLOCK_SIZE": 1024,
        "paged_stash_copy_kernel": _Refusal(),
        "paged_stash_pop_kernel": _Refusal(),
    },
    "emerging_optimizers.triton_kernels": {"HAS_TRITON_340": False, "tsyrk_ex": _Refusal()},
}
"""Modules that need triton as soon as they are imported, and what others take from them."""


def do_without_triton() -> None:
    """Let megatron-core and emerging-optimizers be imported without triton, as in an image for CPUs.

    What everything imports needs it at once, for kernels that only run on a GPU. Their stand-ins say so if
    they are used.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    for name, content in _WITHOUT_TRITON.items():
        stand_in = types.ModuleType(name, "Kernels that are not there.")
        vars(stand_in).update(content)
        sys.modules[name] = stand_in


def switch_off_compilation() -> None:
    """Leave megatron-core's small fused functions uncompiled: on the CPU a compile costs more than a run.

    They are decorated when their modules are imported, so this must precede megatron-core's first import.
    """

    def leave_alone(function: Any = None, **_: Any) -> Any:
        return leave_alone if function is None else function

    torch.compile = leave_alone  # type: ignore[assignment]


def return_split_sizes_as_numpy() -> None:
    """Let `maybe_move_tensor_to_cpu` honour `as_numpy` for a tensor that already is on the CPU.

    The token dispatcher hands the result to `all_to_all_single`, which takes split sizes as a sequence of
    numbers and refuses a tensor.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    original = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    moe_utils.maybe_move_tensor_to_cpu = move
    token_dispatcher.maybe_move_tensor_to_cpu = move


@contextlib.contextmanager
def cpu_tensors_named_cuda() -> Iterator[None]:
    """Within: `tensor.type()` says "torch.cuda.FloatTensor" for a float tensor on CPU or meta, and so on."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _under_cuda_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with cpu_tensors_named_cuda():
            return function(*args, **kwargs)

    return call


def accept_cpu_parameters_in_optimizers() -> None:
    """Let CPU parameters pass the optimizers' comparisons with the string "torch.cuda.FloatTensor"."""
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build = DistributedOptimizer._build_model_and_main_param_groups
    DistributedOptimizer._build_model_and_main_param_groups = classmethod(_under_cuda_names(build.__func__))
    clip = _under_cuda_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = clip
    optimizer.clip_grad_by_total_norm_fp32 = clip


def copy_rng_state_from_cpu() -> None:
    """Let megatron-core's "CUDA" generator state be the CPU generator's, so that recompute replays it.

    It reaches past `torch.cuda.get_rng_state`, which `cuda_shim` has redirected, to the driver.
    """
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = torch.cuda.get_rng_state
    random._set_cuda_rng_state = torch.cuda.set_rng_state
