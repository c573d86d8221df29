"""Choose the device megatron-core runs on, before any of its modules is imported.

`use_platform("cuda")` takes the local GPU; `use_platform("cpu")` runs the same megatron-core code in host
memory over gloo; with `use_platform("meta")` it can only be built, without memory (dry run). Each checks that
the installed megatron-core is the version that the patches were written for.
"""

import importlib.metadata
import os

import torch

from parallel.config import CUDA_ALLOCATOR, CUDA_QUEUES
from parallel.megatron.patches import cuda_shim, instrument, pass_hooks, upstream_fixes

MEGATRON_CORE_VERSION = "0.19.2"


class MegatronVersionError(RuntimeError):
    """The installed megatron-core is not the one that the patches of `parallel/megatron` were written for."""


def check_megatron_version() -> None:
    """Raise `MegatronVersionError` unless megatron-core is exactly `MEGATRON_CORE_VERSION`."""
    installed = importlib.metadata.version("megatron-core")
    if installed != MEGATRON_CORE_VERSION:
        raise MegatronVersionError(
            f"megatron-core is {installed}, but parallel/megatron patches {MEGATRON_CORE_VERSION}: "
            f"install megatron-core=={MEGATRON_CORE_VERSION}, or move each patch and the tests in "
            "tests/unit/megatron/test_seam.py to the new version"
        )


def use_platform(device_type: str) -> torch.device:
    """Prepare this process for "cpu", "cuda" or "meta" and return the device tensors live on. Idempotent.

    Raises `MegatronVersionError`, or `RuntimeError` if a GPU is requested and none is visible.
    """
    check_megatron_version()
    if device_type == "cuda":
        # CUDA reads it once, when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(CUDA_QUEUES))
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", CUDA_ALLOCATOR)
        if not torch.cuda.is_available():
            raise RuntimeError(
                "cluster.device=cuda, but torch sees no CUDA device: use a cluster with device=cpu "
                "(cluster=local), or check the driver and CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device(device_type)
        cuda_shim.install(device)
    # The order matters: modules of megatron-core import collectives and `torch.compile` by name.
    instrument.trace_collectives()
    upstream_fixes.install(on_cpu=device.type != "cuda")
    pass_hooks.install()
    instrument.trace_megatron()
    return device


def has_work_left(device: torch.device) -> bool:
    """Whether a GPU has not finished what was submitted to it; a CPU finishes work when it is submitted."""
    return device.type == "cuda" and not torch.cuda.default_stream(device).query()
